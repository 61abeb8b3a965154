"""Quantizes a model into a packed checkpoint. A run makes the layout first: it refuses early."""
