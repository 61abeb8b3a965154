"""Read and write EXL3 folders, as ExLlamaV3 and GPTQModel do (ExLlamaV3's sources, MIT).

Tensors of a linear layer ``M``, whose weight is ``[out, in]``, both multiples of 128::

    M.trellis         int16 [in / 16, out / 16, 16 K]    walks of K bits a weight, 1 to 8;
                                                         with mul1 also 1.5, 2.5 and 3.5
    M.suh, M.svh      fp16  [in], [out]                  scales of inputs and outputs, with signs
    M.su, M.sv        int16 [in / 16], [out / 16]        older files: signs alone, 1 for −1
    M.mcg or M.mul1   int32                              chooses the code function; else 3inst
    M.bias            fp16  [out]                        an ordinary bias, if any

A state has 16 bits, and Hadamard matrices are 128 wide: our layout ``exl3``, tensor by tensor
(:mod:`modulora_qtip.quantizer`). Layers have widths of their own, the head mostly 6 bits.

ExLlamaV3 pads weights with zeros to multiples of 128. It stores q, k and v of a layer
``qkv_proj``, and gate and up of ``gate_up_proj``, as layers of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import (
    CheckpointFormat,
    ForeignWeight,
    Read,
    StoredWeight,
    check_tensors,
    read_finite,
)
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_qtip import SPEC
from modulora_qtip.codes import CODES
from modulora_qtip.quantizer import QTIP
from modulora_qtip.reference import EXL3_BLOCK as BLOCK
from modulora_qtip.reference import (
    EXL3_CODES,
    EXL3_HALVES,
    EXL3_STATES,
    Options,
    is_exl3_rate,
)
from modulora_qtip.trellis import TILE

FORMAT = "exl3"
BITS = (*range(1, 9), *EXL3_HALVES)

MARKS = tuple(code for code in EXL3_CODES if code != "3inst")
"""The names of tensors whose presence chooses a code function."""

WIDER = ("bfloat16", "float32")
"""Dtypes in which tools save fp16 scales again, with the model's other tensors."""

TABLES = ("embed_tokens", "wte", "word_embeddings")
"""transformers' names of input embeddings."""

HEAD = "lm_head"
"""transformers' name of a language model's head."""


class EXL3(CheckpointFormat):
    """Trellis-coded weights of 1 to 8 bits and some halves, which may differ between layers."""

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def check(self, config: Mapping[str, Any]) -> None:
        for key, known in (("format", (FORMAT,)), ("codebook", EXL3_CODES)):
            if config.get(key) not in (None, *known):
                raise ModelError(
                    f"EXL3 config: {key}: expected {' or '.join(known)}, got {config[key]!r}, "
                    "which is not implemented; quantize the original model"
                )

    def weights(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout], read: Read
    ) -> dict[str, ForeignWeight]:
        del read  # scales are checked when they are read
        quantizers: dict[Options, QTIP] = {}
        found: dict[str, ForeignWeight] = {}
        for module, names in _layers(tensors):
            _check_kind(module)
            shape, bits = _check_trellis(module, tensors)
            mark = _mark(module, names, config)
            if not is_exl3_rate(bits, mark or "3inst"):
                raise CheckpointError(
                    f"{module}: expected the code mul1 for {bits} bits, got {mark or '3inst'}; "
                    "download the model again"
                )
            options = _options(bits, mark or "3inst")
            quantizer = quantizers.setdefault(options, QTIP(options))
            scales = {
                side: _scales(module, side, n, tensors) for side, n in zip("vu", shape, strict=True)
            }
            marks = [f"{module}.{mark}"] if mark else []
            found[module] = _weight(module, quantizer, scales, marks, shape, shape)
        return found

    def plan(self, weight: StoredWeight) -> dict[str, TensorLayout]:
        self.check_packed_by(SPEC.name, weight)
        states, code, order = (weight.layout.metadata[n] for n in ("states", "code", "hadamard"))
        if (states, order) != (EXL3_STATES, str(BLOCK)) or code not in EXL3_CODES:
            raise ModelError(
                f"packed with states={states}, code={code} and Hadamard matrices of order {order}; "
                f"{self.spec.name} has {EXL3_STATES}, one of {', '.join(EXL3_CODES)}, and {BLOCK}. "
                "Quantize the model again with -o layout=exl3"
            )
        mark = {code: TensorLayout("int32", ())} if code in MARKS else {}
        return {**weight.layout.tensors, **mark}

    def tensors(self, weight: StoredWeight) -> dict[str, Tensor]:
        made = dict(weight.packed().tensors)
        code = weight.layout.metadata["code"]
        if code in MARKS:
            made[code] = torch.tensor(_signed(CODES[code].multiplier), dtype=torch.int32)
        return made

    def config(self, weights: list[StoredWeight], kept: list[str]) -> dict[str, Any]:
        del kept  # a layer without a trellis is dense
        storage = {weight.module: self._storage(weight) for weight in weights}
        bits = {weight.module: weight.layout.metadata["bits"] for weight in weights}
        codes = {weight.layout.metadata["code"] for weight in weights}
        return {
            "quant_method": FORMAT, "format": FORMAT,
            "bits": _mean(weight for weight in weights if weight.module != HEAD),
            **({"head_bits": bits[HEAD]} if HEAD in bits else {}),
            **({"codebook": codes.pop()} if len(codes) == 1 else {}),
            "tensor_storage": storage,
        }  # fmt: skip

    def _storage(self, weight: StoredWeight) -> dict[str, Any]:
        stored = {
            f"{weight.module}.{name}": {"shape": list(t.shape), "torch_dtype": t.dtype}
            for name, t in (self.plan(weight) | _bias(weight)).items()
        }
        bits, code = (weight.layout.metadata[name] for name in ("bits", "code"))
        facts = {"stored_tensors": stored, "quant_format": FORMAT, "bits_per_weight": bits}
        return facts | ({f"{code}_multiplier": CODES[code].multiplier} if code in MARKS else {})


def _bias(weight: StoredWeight) -> dict[str, TensorLayout]:
    return {} if weight.bias is None else {"bias": weight.bias}


def _layers(tensors: Mapping[str, TensorLayout]) -> Iterable[tuple[str, set[str]]]:
    """Each quantized layer, with the last parts of its tensors' names."""
    modules: dict[str, set[str]] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        modules.setdefault(module, set()).add(part)
    for module, names in modules.items():
        if "trellis" in names:
            yield module, names
        elif names & {"suh", "svh", "su", "sv"}:
            raise CheckpointError(
                f"{module}.trellis: expected it beside {', '.join(sorted(names))}, got nothing; "
                "download the model again"
            )


def _check_kind(module: str) -> None:
    if module.rpartition(".")[2] in TABLES:
        raise CheckpointError(
            f"{module}: expected a linear layer, got an embedding table: ExLlamaV3 1.6 packs them, "
            "and this version does not read them; take a revision whose table is dense"
        )


def _check_trellis(
    module: str, tensors: Mapping[str, TensorLayout]
) -> tuple[tuple[int, int], float]:
    """``(out, in)`` and the bits of a layer. Raises CheckpointError if its trellis is malformed."""
    name = f"{module}.trellis"
    trellis = tensors[name]
    got = f"{trellis.dtype} {list(trellis.shape)}"
    if trellis.dtype != "int16" or len(trellis.shape) != 3:
        raise CheckpointError(f"{name}: expected int16 [in / 16, out / 16, 16 K], got {got}")
    rows, columns, words = trellis.shape
    bits = words / TILE
    if bits not in BITS:
        raise CheckpointError(
            f"{name}: expected 16 K numbers for each tile, K from 1 to 8 bits, or 1.5, 2.5 or 3.5, "
            f"got {got}"
        )
    shape = columns * TILE, rows * TILE
    for side, size in zip(("out_features", "in_features"), shape, strict=True):
        if size == 0 or size % BLOCK:
            raise CheckpointError(
                f"{name}: expected a multiple of {BLOCK} as {side}, got {size} by its shape {got}"
            )
    return shape, bits


def _mark(module: str, names: set[str], config: Mapping[str, Any]) -> str | None:
    """The tensor that chooses the code function. Raises CheckpointError if the config differs."""
    marks = [mark for mark in MARKS if mark in names]
    if len(marks) > 1:
        raise CheckpointError(
            f"{module}: expected {' or '.join(MARKS)}, which choose the code function, got both"
        )
    code, declared = (marks or ["3inst"])[0], _declared(module, config)
    if declared not in (None, code):
        raise CheckpointError(
            f"{module}: expected the code function {declared} by config.json, got {code} by the "
            "layer's tensors; download the model again"
        )
    return marks[0] if marks else None


def _declared(module: str, config: Mapping[str, Any]) -> Any:
    """The code function of a layer by the config; None if the config does not say it.

    Layers of several models may be joined, so a layer's own entry comes first.
    """
    storage = config.get("tensor_storage")
    layer = storage.get(module) if isinstance(storage, Mapping) else None
    stored = layer.get("stored_tensors") if isinstance(layer, Mapping) else None
    if isinstance(stored, Mapping):
        return next((mark for mark in MARKS if f"{module}.{mark}" in stored), "3inst")
    return config.get("codebook")


def _scales(module: str, side: str, n: int, tensors: Mapping[str, TensorLayout]) -> str:
    """The name of the scales of a side, ``"u"`` or ``"v"``. Raises CheckpointError: other sizes."""
    scales, signs = f"{module}.s{side}h", f"{module}.s{side}"
    if scales in tensors or signs not in tensors:
        found = tensors.get(scales)
        other = found is not None and found.dtype in WIDER and found.dtype
        check_tensors({scales: TensorLayout(other or "float16", (n,))}, tensors, "trellis")
        return scales
    check_tensors({signs: TensorLayout("int16", (n // 16,))}, tensors, "trellis")
    return signs


def _options(bits: float, code: str) -> Options:
    return Options.model_validate({"bits": bits, "code": code, "layout": "exl3"})


def _weight(
    module: str,
    quantizer: QTIP,
    scales: Mapping[str, str],
    marks: list[str],
    padded: tuple[int, int],
    shape: tuple[int, int],
) -> ForeignWeight:
    """A layer ``[out, in]`` whose tensors in the files are of the size ``padded``."""
    if tuple(-(-n // BLOCK) * BLOCK for n in shape) != padded:
        raise CheckpointError(
            f"{module}.trellis: expected {list(shape)} by the config, each rounded up to a "
            f"multiple of {BLOCK}, got {list(padded)}; the weights don't belong to this config"
        )
    names = (f"{module}.trellis", scales["u"], scales["v"], *marks)
    layout = quantizer.layout(shape)

    def unpack(read: Read) -> PackedWeight:
        for mark in marks:
            _check_multiplier(read(mark), mark)
        stored = {f"s{side}h": _read_scales(read, name) for side, name in scales.items()}
        return layout.fill({"trellis": read(names[0]), **stored})

    cut = partial(_weight, module, quantizer, scales, marks, padded)
    return ForeignWeight(names, quantizer, layout, unpack, cut=cut)


def _read_scales(read: Read, name: str) -> Tensor:
    if name.endswith("h"):
        stored = read_finite(read, name)
        scales = stored.to(torch.float16)
        if not torch.equal(scales.to(stored.dtype), stored):  # a tool saved them in another dtype
            raise CheckpointError(
                f"{name}: expected numbers of fp16, got {stored.dtype} that fp16 can't hold"
            )
        return scales
    places = torch.arange(16)
    negative = read(name).to(torch.int32)[:, None] >> places & 1
    return (1 - 2 * negative).flatten().to(torch.float16)


def _check_multiplier(mark: Tensor, name: str) -> None:
    """Refuse a code function of another multiplier, which would decode to other weights."""
    known = CODES[name.rpartition(".")[2]].multiplier
    if mark.flatten().tolist() != [_signed(known)]:
        raise CheckpointError(
            f"{name}: expected the multiplier {known:#x}, got {mark.tolist()}, another code "
            "function, which is not implemented; quantize the original model"
        )


def _signed(number: int) -> int:
    """The int32 with the bits of an unsigned number."""
    return number - (number >> 31 << 32)


def _mean(weights: Iterable[StoredWeight]) -> float:
    """The mean bits of a weight, without scales."""
    counts = [(math.prod(w.layout.shape), w.layout.metadata["bits"]) for w in weights]
    bits: float = sum(count * bits for count, bits in counts)
    return round(bits / max(1, sum(count for count, _ in counts)), 2)
