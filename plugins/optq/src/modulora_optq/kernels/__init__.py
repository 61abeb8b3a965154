"""Compiled code. Nobody needs it to understand the method, which is in reference.py."""
