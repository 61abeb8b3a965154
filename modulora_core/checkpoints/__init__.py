"""Packed checkpoints: opened, loaded, converted and written.

``checkpoint`` opens any MODEL and loads packed ones; ``packed_checkpoint`` is an opened one, and
``record`` its part of config.json. ``written`` is for what we write, ``foreign`` for what other
tools wrote, and ``hf`` for what transformers calls.
"""
