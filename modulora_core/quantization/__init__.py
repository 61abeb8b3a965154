"""Quantizes a model into a packed checkpoint.

    layout.py      how every parameter will be stored
    packer.py      packing parameters into files
    quantize.py    the run, with the public function ``quantize``
    mixed/         a quantizer for each layer, chosen within a budget

A run makes the layout first, and so refuses wrong requests before any work.
"""
