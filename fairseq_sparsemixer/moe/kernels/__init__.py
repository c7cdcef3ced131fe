"""All that is Triton, and the operators of PyTorch that the kernels are called through."""
