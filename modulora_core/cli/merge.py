"""``modulora merge``."""

from __future__ import annotations

from typing import Annotated

from modulora_core.cli.arguments import Adapter, Model, Out, option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts

Dtype = Annotated[str, option("--dtype DTYPE", "Dtype of weights: float16, bfloat16, float32.")]


def command(model: Model, out: Out, adapter: Adapter = None, dtype: Dtype = "bfloat16") -> Report:
    """Dequantize a packed model and add an adapter to its weights.

    It writes W = Ŵ + s·B·A, one parameter at a time, to a folder that transformers loads without
    modulora. Without an adapter it only dequantizes.

    Examples:
        modulora merge smollm2-packed merged --adapter my-adapter
        modulora merge smollm2-packed unpacked --dtype float32
    """
    from modulora_core.adapters.merge import merge

    with terminal().progress("merging", "parameters") as show:
        result = merge(model, out, adapter=adapter, dtype=dtype, progress=show)
    return Report(result.to_json(), facts(result.to_json()))
