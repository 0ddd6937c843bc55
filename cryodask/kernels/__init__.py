"""Numerical kernels: tensors in, tensors out. They use torch, numpy and scipy, and are independent of files, Dask and the store."""
