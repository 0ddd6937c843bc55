"""Numerical kernels: tensors in, tensors out. They know torch and numpy, and nothing of files, Dask or the store."""
