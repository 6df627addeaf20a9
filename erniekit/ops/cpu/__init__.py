"""Fast fp32 kernels for the CPU: C++ compiled at first use, wrapped as PyLayers. `ops/` chooses; models do not know."""
