"""Packed embeddings."""
