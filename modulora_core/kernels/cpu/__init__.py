"""The toolkit for kernels that numba compiles."""
