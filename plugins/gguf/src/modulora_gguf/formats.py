"""GGUF files as models: the core finds the tensors, and this module says how blocks are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from modulora_core.models.formats import ForeignWeight, FormatReader
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_gguf import SPEC, reference
from modulora_gguf.quantizer import GGUF, Options

Read = Callable[[str], Tensor]


class File(FormatReader):
    """A whole model in a GGUF file."""

    def weights(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorLayout],
        read: Read,  # noqa: ARG002 - headers say all
    ) -> Mapping[str, ForeignWeight]:
        """The weights of known types; ``config["types"]`` has the type of each."""
        quantizers = {
            kind: GGUF(Options.model_validate({"type": kind})) for kind in reference.DEQUANTIZE
        }
        return {
            name: _weight(name, quantizers[kind], tensors[name])
            for name, kind in config["types"].items()
            if kind in quantizers
        }


def _weight(name: str, quantizer: GGUF, stored: TensorLayout) -> ForeignWeight:
    weights, nbytes = reference.block_of(quantizer.options.type)
    rows, row_bytes = stored.shape
    layout = quantizer.layout((rows, row_bytes // nbytes * weights))

    def unpack(read: Read) -> PackedWeight:
        blocks = read(name).contiguous()
        return PackedWeight(
            SPEC.name, quantizer.format, layout.shape, {"blocks": blocks}, layout.metadata
        )

    return ForeignWeight((name,), quantizer, layout, unpack)
