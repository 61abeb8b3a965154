"""Packed checkpoints: opened and written.

``opening`` opens any MODEL. ``packed_checkpoint`` is an opened one, ``record`` its part of
config.json, and ``mapped`` its files in memory. ``packed_modules`` puts packed modules into a
model. ``packing`` calls quantizers. ``outputs``, ``shards`` and ``model_card`` write folders, and
``foreign`` reads other tools' folders.
"""
