"""Read bitsandbytes' NF4 folders, as transformers saves them with ``load_in_4bit``.

Tensors of a linear layer ``M``, whose weight is ``[out, in]``, with (..) by double quantization::

    M.weight                     codes, two a byte, in any dtype: [bytes / itemsize, 1]
    M.weight.absmax              fp32 [blocks]          (uint8 [blocks])
    M.weight.quant_map           fp32 [16]: the levels
    (M.weight.nested_absmax)     fp32 [blocks / 256]
    (M.weight.nested_quant_map)  fp32 [256]: the dynamic map
    M.weight.quant_state.bitsandbytes__nf4      uint8: JSON with shape, blocksize, nested_offset

The codes and constants are ours, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import (
    ForeignWeight,
    FormatReader,
    Read,
    check_tensors,
    read_finite,
)
from modulora_core.models.json_files import check_json
from modulora_core.spec import PackedLayout, PackedWeight, TensorLayout
from modulora_nf4 import reference
from modulora_nf4.quantizer import NF4, Options

_MARK = ".quant_state.bitsandbytes__"
_SAME = 1e-6
"""The largest relative difference of two maps: torch's versions round linspace's last bit."""


class State(BaseModel):
    """The JSON in ``quant_state``: the facts of one weight."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    quant_type: Literal["nf4"]
    shape: tuple[PositiveInt, PositiveInt]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    nested_blocksize: Literal[256] = 256
    nested_offset: float | None = None

    @classmethod
    def of(cls, name: str, data: bytes) -> State:
        return check_json(data, cls, name, advice="it isn't implemented, or the file is damaged")


class BitsAndBytes(FormatReader):
    """bitsandbytes' 4-bit weights of the type nf4."""

    def check(self, config: Mapping[str, Any]) -> None:
        kind = config.get("bnb_4bit_quant_type", "nf4")
        if kind != "nf4":
            raise _other_type("bitsandbytes config", kind)

    def weights(
        self,
        config: Mapping[str, Any],  # noqa: ARG002 - each weight has its own facts
        tensors: Mapping[str, TensorLayout],
        read: Read,
    ) -> dict[str, ForeignWeight]:
        found, quantizers = dict[str, ForeignWeight](), dict[Options, NF4]()
        for name in tensors:
            weight, mark, kind = name.partition(_MARK)
            if not mark:
                continue
            if kind != "nf4" or not weight.endswith(".weight"):
                raise _other_type(weight, kind)
            state = State.of(name, bytes(read(name).tolist()))
            nested = state.nested_offset is not None
            options = Options(block_size=state.blocksize, double_quant=nested)
            quantizer = quantizers.setdefault(options, NF4(options))
            layout = quantizer.layout(state.shape)
            parts = _check(weight, layout, tensors)
            unpack = partial(_unpack, weight, layout, state)
            module = weight.removesuffix(".weight")
            found[module] = ForeignWeight((weight, *parts, name), quantizer, layout, unpack)
        return found


def _other_type(subject: str, kind: object) -> ModelError:
    return ModelError(
        f"{subject}: quantized as {kind}; only nf4 weights of linear layers are read. Quantize "
        'again with bnb_4bit_quant_type="nf4", or give the original model'
    )


def _check(weight: str, layout: PackedLayout, tensors: Mapping[str, TensorLayout]) -> list[str]:
    """The names of a weight's constants. Raises CheckpointError if a tensor is missing or odd."""
    ours = layout.tensors
    parts = {
        "absmax": ours.get("absmax_codes") or ours["absmax"],
        "quant_map": TensorLayout("float32", (len(reference.LEVELS),)),
    }
    if layout.metadata["double_quant"]:
        parts["nested_absmax"] = ours["nested_absmax"]
        parts["nested_quant_map"] = TensorLayout("float32", (256,))
    expected = {f"{weight}.{part}": tensor for part, tensor in parts.items()}
    check_tensors(expected, tensors, "its quant_state")
    codes = tensors.get(weight)
    if codes is None or codes.nbytes != ours["codes"].nbytes:
        got = "nothing" if codes is None else f"{codes.nbytes}"
        raise CheckpointError(
            f"{weight}: expected {ours['codes'].nbytes} bytes by its quant_state, got {got}"
        )
    return list(expected)


def _unpack(weight: str, layout: PackedLayout, state: State, read: Read) -> PackedWeight:
    """The packed weight. Raises CheckpointError: other levels than ours, or NaN or Inf."""
    tensors = {"codes": read(weight).contiguous().view(torch.uint8).view(-1)}
    _check_map(read, f"{weight}.quant_map", torch.tensor(reference.LEVELS, dtype=torch.float32))
    if not layout.metadata["double_quant"]:
        return layout.fill(tensors | {"absmax": read_finite(read, f"{weight}.absmax")})
    _check_map(read, f"{weight}.nested_quant_map", reference.dynamic_map())
    nested = {
        "absmax_codes": read(f"{weight}.absmax"),
        "nested_absmax": read_finite(read, f"{weight}.nested_absmax"),
        "offset": torch.tensor([state.nested_offset], dtype=torch.float32),
    }
    return layout.fill(tensors | nested)


def _check_map(read: Read, name: str, expected: Tensor) -> None:
    if not torch.allclose(read(name), expected, rtol=_SAME, atol=0):
        raise CheckpointError(
            f"{name}: expected the {len(expected)} values of this type, got others; the file is "
            "damaged, or another tool wrote it"
        )
