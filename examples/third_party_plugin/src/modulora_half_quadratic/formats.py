"""Read HQQ folders, as transformers saves a model with its ``HqqConfig``.

Tensors of a linear layer ``M``, whose weight is ``[out, in]``, with R = out · in / G groups of G::

    M.W_q                       codes, uint8 [R · bits / 8, G]; of 3 bits int32 [⌈R / 10⌉, G]
    M.scale, M.zero             s and z, float [R, 1]
    M.nbits, M.group_size, M.axis, M.shape, ...      the facts of the layer, one tensor each

The codes of a column fill the highest bits of its words first, then the next ones. Ŵ = s (q − z).
We store −s z in fp16, which changes Ŵ by at most 2⁻¹¹ · |s z|. HQQ rounds q − z as much. Scales in
fp32, which few folders have, are rounded to fp16 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import ForeignWeight, FormatReader, Read, read_finite
from modulora_core.spec import PackedLayout, PackedWeight, TensorLayout
from modulora_half_quadratic import packing, reference
from modulora_half_quadratic.options import Options
from modulora_half_quadratic.quantizer import HalfQuadratic

BITS = (8, 4, 3, 2, 1)


class Facts(NamedTuple):
    """The facts of a layer."""

    bits: int
    group_size: int
    shape: tuple[int, int]

    @classmethod
    def read(cls, module: str, read: Read) -> Facts:
        """Raises ModelError: the layer's groups are not consecutive weights of a row."""
        bits, size, axis = (int(read(f"{module}.{name}")) for name in _FACTS)
        out_features, in_features = read(f"{module}.shape").tolist()
        if axis != 1 or bits not in BITS or size < 1 or in_features % size:
            raise ModelError(
                f"{module}: expected HQQ's axis 1, {', '.join(map(str, BITS))} bits, and groups "
                f"that fill rows, got axis {axis}, {bits} bits and groups of {size} in rows of "
                f"{in_features}; quantize the original model"
            )
        return cls(bits, size, (out_features, in_features))

    @property
    def groups(self) -> int:
        return self.shape[0] * self.shape[1] // self.group_size

    @property
    def fields(self) -> int:
        """Codes in a word."""
        return 10 if self.bits == 3 else 8 // self.bits

    @property
    def word(self) -> torch.dtype:
        return torch.int32 if self.bits == 3 else torch.uint8


_FACTS = ("nbits", "group_size", "axis")


class HQQ(FormatReader):
    """HQQ's weights of groups along rows."""

    def weights(
        self,
        config: Mapping[str, Any],  # noqa: ARG002 - each layer has its own facts
        tensors: Mapping[str, TensorLayout],
        read: Read,
    ) -> dict[str, ForeignWeight]:
        found = dict[str, ForeignWeight]()
        quantizers = dict[Options, HalfQuadratic]()
        for name in tensors:
            module, mark, rest = name.rpartition(".W_q")
            if not mark or rest:
                continue
            facts = Facts.read(module, read)
            try:
                options = Options(bits=facts.bits, group_size=facts.group_size)
            except ValidationError as error:
                reason = error.errors(include_url=False)[0]["msg"]
                raise ModelError(f"{module}: group_size {facts.group_size}: {reason}") from None
            quantizer = quantizers.setdefault(options, HalfQuadratic(options))
            layout = quantizer.layout(facts.shape)
            _check(module, facts, tensors)
            facts_too = {each for each in tensors if each.rpartition(".")[0] == module}
            parts = (name, *sorted(facts_too - {name, f"{module}.bias"}))
            found[module] = ForeignWeight(
                parts, quantizer, layout, partial(_unpack, module, facts, layout)
            )
        return found


def _check(module: str, facts: Facts, tensors: Mapping[str, TensorLayout]) -> None:
    """Refuse tensors that don't fit the facts, which may be seen as another dtype."""
    words = -(-facts.groups // facts.fields) * facts.group_size * facts.word.itemsize
    got = tensors[f"{module}.W_q"].nbytes
    if got != words:
        raise CheckpointError(f"{module}.W_q: expected {words} bytes by its shape, got {got}")
    for part in ("scale", "zero"):
        layout = tensors.get(f"{module}.{part}")
        if layout is None or layout.shape != (facts.groups, 1):
            found = "nothing" if layout is None else list(layout.shape)
            raise CheckpointError(
                f"{module}.{part}: expected {[facts.groups, 1]} by its shape, got {found}"
            )


def unpack_codes(words: Tensor, facts: Facts) -> Tensor:
    """Words of any dtype to codes, uint8 ``[out, in]``."""
    words = words.contiguous().view(facts.word)
    shifts = range(facts.bits * (facts.fields - 1), -1, -facts.bits)
    codes = [((words >> shift) & (2**facts.bits - 1)).to(torch.uint8) for shift in shifts]
    return torch.cat(codes)[: facts.groups].reshape(facts.shape)


def _unpack(module: str, facts: Facts, layout: PackedLayout, read: Read) -> PackedWeight:
    codes = unpack_codes(read(f"{module}.W_q"), facts)
    s, z = (read_finite(read, f"{module}.{part}").float() for part in ("scale", "zero"))
    s, b = (part.view(facts.shape[0], -1) for part in (s, -s * z))
    unit = reference.unit(torch.stack([b, b + s * (2**facts.bits - 1)]))
    if not bool(unit.isfinite()):
        raise CheckpointError(f"{module}.scale: expected smaller values; the file is damaged")
    return layout.fill(
        {
            "codes": packing.pack(codes, facts.bits),
            "scales": (s / unit).half(),
            "offsets": (b / unit).half(),
            "unit": unit,
        }
    )
