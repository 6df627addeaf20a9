"""ERNIE 4.5 written for one device: no process group, no rank, no file, no run config."""
