"""The toolkit for kernels in Triton."""
