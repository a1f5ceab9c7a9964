"""The Triton kernels and the functions that launch them. The only files that import Triton; imported when used."""
