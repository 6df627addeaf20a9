"""Tensor kernels, each with a plain Paddle twin. Choose by tensor place and type; know nothing of models or configs."""
