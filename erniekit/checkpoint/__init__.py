"""What is on disk: model folders in any layout, read, written, converted and judged.

`keys` and `ernie45` say where every piece of a model lies; everything else walks over that map. Only `model_io` touches
paddle; the rest works on numpy arrays, so that converting and verifying never load it.
"""
