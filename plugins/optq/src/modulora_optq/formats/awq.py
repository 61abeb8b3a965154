"""Read AWQ folders of the layout ``gemm``, as AutoAWQ, GPTQModel, vLLM and transformers do.

Tensors of a linear layer ``M``, whose weight is ``[out, in]`` with G groups of columns::

    M.qweight   int32 [in, out / 8]    codes of 8 rows in a word
    M.qzeros    int32 [G, out / 8]     zero points, likewise
    M.scales    fp16  [G, out]

The lowest four bits of a word have row 0, the next ones row 2, then 4, 6, 1, 3, 5 and 7. The scales
of AWQ (Lin et al. 2023, arXiv 2306.00978) are in the layer before, so activations need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError, OptionError
from modulora_core.models.formats import (
    ForeignWeight,
    FormatReader,
    Read,
    check_tensors,
    read_finite,
)
from modulora_core.options import validate_model
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_optq.options import SMALLEST_GROUP, WHOLE_ROW, Options
from modulora_optq.quantizer import OPTQ, from_solution
from modulora_optq.reference import Solution

BITS: Literal[4] = 4
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""The lowest bit of each of a word's eight rows."""

_OLDER = {"w_bit": "bits", "q_group_size": "group_size", "format": "version"}


class Config(BaseModel):
    """The config of a folder."""

    model_config = ConfigDict(frozen=True)

    bits: Literal[4] = 4
    group_size: int = 128
    version: Literal["gemm"] = "gemm"

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value != WHOLE_ROW and value < SMALLEST_GROUP:
            raise ValueError(f"expected {SMALLEST_GROUP} or more, or {WHOLE_ROW}")
        return value

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Config:
        """Read a config with AutoAWQ's or GPTQModel's names.

        Raises:
            ModelError: it is malformed, or another layout.
        """
        named = {_OLDER.get(name, name): value for name, value in data.items()}
        known = {key: value for key, value in named.items() if key in cls.model_fields}
        if isinstance(known.get("version"), str):
            known["version"] = known["version"].lower()
        try:
            return validate_model("AWQ config", cls, known)
        except OptionError as error:
            raise ModelError(
                f"{error}; anything else is not implemented. Take the model's gemm folder, or "
                "quantize the original model"
            ) from None


class AWQ(FormatReader):
    """AWQ's 4-bit weights with a zero point for each group."""

    def check(self, config: Mapping[str, Any]) -> None:
        Config.of(config)

    def weights(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout], read: Read
    ) -> dict[str, ForeignWeight]:
        del read  # the layouts are known from headers
        size = Config.of(config).group_size
        quantizer = OPTQ(
            Options(
                bits=BITS,
                group_size=size,
                symmetric=False,
                act_order=False,
                static_groups=False,
                range_search=False,
            )
        )
        found = dict[str, ForeignWeight]()
        for name in tensors:
            module, _, part = name.rpartition(".")
            if part == "scales" and f"{module}.qweight" not in tensors:
                raise ModelError(
                    f"{name}: expected a quantized layer there, got scales of activations, which "
                    "are not implemented; quantize the original model"
                )
            if part != "qweight":
                continue
            shape = _check_shapes(module, size, tensors)
            names = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
            unpack = partial(_unpack, module, quantizer.options)
            found[module] = ForeignWeight(names, quantizer, quantizer.layout(shape), unpack)
        return found


def _check_shapes(module: str, size: int, tensors: Mapping[str, TensorLayout]) -> tuple[int, int]:
    """``(out, in)`` of a layer. Raises CheckpointError if its tensors or the config disagree."""
    qweight = tensors[f"{module}.qweight"]
    if qweight.dtype != "int32" or len(qweight.shape) != 2:
        raise CheckpointError(
            f"{module}.qweight: expected int32 [in, out / 8], got {qweight.dtype} "
            f"{list(qweight.shape)}"
        )
    in_features, words = qweight.shape
    groups = 1 if size == WHOLE_ROW else -(-in_features // size)
    expected = {
        f"{module}.qzeros": TensorLayout("int32", (groups, words)),
        f"{module}.scales": TensorLayout("float16", (groups, words * len(SHIFTS))),
    }
    check_tensors(expected, tensors, f"qweight and the config (group size {size})")
    return words * len(SHIFTS), in_features


def unpack_words(words: Tensor) -> Tensor:
    """Words, int32 ``[n, out / 8]``, to codes, uint8 ``[out, n]``."""
    codes = [((words >> shift) & 15).to(torch.uint8).t() for shift in SHIFTS]
    return torch.stack(codes, dim=1).flatten(0, 1)


def _unpack(module: str, options: Options, read: Read) -> PackedWeight:
    codes, zeros = (unpack_words(read(f"{module}.{part}")) for part in ("qweight", "qzeros"))
    scales = read_finite(read, f"{module}.scales").t().contiguous()
    return from_solution(Solution(codes, scales, zeros, None), options)
