"""Triton kernels for Hopper GPUs: FP8 quantisation, grouped products, and moves of routed rows. They take tensors of
any framework that have data_ptr(), shape, dtype, strides and is_contiguous(), and write into tensors that the caller
made; they know neither Paddle nor torch, and a module here is imported only where Triton is installed
(ops/dispatch.py). Tested in Triton's interpreter and compiled for Hopper; not run on a GPU."""
