"""Packed checkpoints: opened, loaded, converted and written.

``checkpoint`` opens any MODEL and loads packed ones; ``packed_checkpoint`` is an opened one, and
``record`` its part of config.json. ``written`` writes folders, ``foreign`` reads other tools'
folders, and ``hf`` is called by transformers.
"""
