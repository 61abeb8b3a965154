"""Quantizing a model: the layout of the checkpoint, packing, and the run."""
