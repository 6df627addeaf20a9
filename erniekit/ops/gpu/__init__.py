"""Paddle on Triton's kernels (ops/triton): how it launches them, and the autograd around them. Imported only where
ops/dispatch.py chooses them. Tested in Triton's interpreter; not run on a GPU."""
