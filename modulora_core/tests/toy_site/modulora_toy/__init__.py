"""A plugin for tests: quantizers ``toy`` and ``verbatim``, formats ``crude`` and ``single``."""

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import FormatSpec, QuantizerSpec

CRUDE = FormatSpec(
    name="crude",
    summary="another tool's format",
    location="modulora_toy.crude:Crude",
    quant_methods=("crude",),
    config_files=("crude.json",),
)
CRUDE_2 = FormatSpec(
    name="crude_2", summary="the same, only written", location="modulora_toy.crude:Crude"
)
CRUDE_3 = FormatSpec(
    name="crude_3",
    summary="the same, only read",
    location="modulora_toy.crude:CrudeReader",
    config_keys=("crude_levels",),
)
SINGLE = FormatSpec(
    name="single",
    summary="a whole model in one file",
    location="modulora_toy.single:SingleFile",
    file_suffix=".single",
    writer="modulora_toy.single:SingleWriter",
)
TOY = QuantizerSpec(
    name="toy",
    summary="Rounds each row to 8 bits",
    location="modulora_toy.quantizer:Toy",
    protocol=1,
    bits=(8,),
    formats=(CRUDE, CRUDE_2, CRUDE_3, SINGLE),
)
VERBATIM = QuantizerSpec(
    name="verbatim",
    summary="Keeps fp32",
    location="modulora_toy.quantizer:Verbatim",
    protocol=1,
    bits=(32,),
)


@hookimpl
def modulora_quantizers():
    return [TOY, VERBATIM]
