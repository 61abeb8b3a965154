"""Quantizes a model into a packed checkpoint.

    assignment.py  which quantizer packs which layers: a file that people write
    layout.py      how every parameter will be stored
    packer.py      packing parameters into files
    quantize.py    the run, with the public function ``quantize``

A run makes the layout first, and so refuses wrong requests before any work.
"""
