"""Measures how fast a quantizer is beside a dense layer, on this machine: ``modulora bench``."""
