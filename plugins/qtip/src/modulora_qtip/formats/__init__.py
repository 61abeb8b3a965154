"""Checkpoint formats of other tools whose weights are the weights of qtip."""
