"""Stands for a module of kernels."""
