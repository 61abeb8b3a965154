"""Checkpoint formats of other tools whose weights are MXFP4 or NVFP4."""
