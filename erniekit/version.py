"""The version, in one place: setup.py, `erniekit version` and checkpoints read it from here."""

__version__ = "0.1.0"
