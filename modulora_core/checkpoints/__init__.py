"""Packed checkpoints: written, opened, loaded, mapped and converted."""
