"""Packed checkpoints: opened, loaded, converted and written.

``loading`` opens any MODEL, and loads a packed one. ``packed_checkpoint`` is an opened one,
``record`` its part of config.json, and ``mapped`` its files in memory. ``matrices`` calls
quantizers, ``written`` writes folders, ``foreign`` reads other tools' folders, and ``hf`` is called
by transformers.
"""
