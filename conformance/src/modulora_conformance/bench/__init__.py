"""How fast a quantizer is beside the dense layer, on this machine: ``modulora bench``."""
