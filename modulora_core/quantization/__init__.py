"""Quantizes a model into a packed checkpoint.

layout.py      how every parameter will be stored
packer.py      packing parameters into files
quantize.py    the run
mixed/         a quantizer for each layer, chosen within a budget
"""
