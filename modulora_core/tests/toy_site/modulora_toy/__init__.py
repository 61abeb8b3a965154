"""A plugin for tests: quantizers ``toy`` and ``verbatim``, formats ``crude`` and ``single``."""

from modulora_core.hookspecs import FormatSpec, hookimpl
from modulora_core.spec import QuantizerSpec

CRUDE = FormatSpec(
    name="crude",
    summary="another tool's format",
    location="modulora_toy.crude:Crude",
    protocol=2,
    quant_methods=("crude",),
    config_files=("crude.json",),
)
CRUDE_2 = FormatSpec(
    name="crude_2",
    summary="the same, only written",
    location="modulora_toy.crude:Crude",
    protocol=2,
)
CRUDE_3 = FormatSpec(
    name="crude_3",
    summary="the same, only read",
    location="modulora_toy.crude:CrudeReader",
    protocol=2,
    config_keys=("crude_levels",),
)
SINGLE = FormatSpec(
    name="single",
    summary="a whole model in one file",
    location="modulora_toy.single:SingleFile",
    protocol=2,
    file_suffix=".single",
    writer="modulora_toy.single:SingleWriter",
)
TOY = QuantizerSpec(
    name="toy",
    summary="Rounds each row to 8 bits",
    location="modulora_toy.quantizer:Toy",
    protocol=2,
    bits=(8,),
)
VERBATIM = QuantizerSpec(
    name="verbatim",
    summary="Keeps fp32",
    location="modulora_toy.quantizer:Verbatim",
    protocol=2,
    bits=(32,),
)


@hookimpl
def modulora_quantizers():
    return [TOY, VERBATIM]


@hookimpl
def modulora_formats():
    return [CRUDE, CRUDE_2, CRUDE_3, SINGLE]
