"""Reads QuIP#'s published checkpoints, relaxml's E8P-2Bit and E8PRVQ-3Bit and -4Bit.

A layer ``M`` with a weight ``[out, in]`` is stored as::

    M.Qidxs         int64 [out, in · bits / 64]    words of codes (:func:`unpack`)
    M.SU, M.SV      fp16  [in], [out]              scales of inputs and outputs, signs at first
    M.Wscale        fp32                           one unit of the codebook
    M.codebook_id   int64
    M.fuse_scales   [parts]                        a factor for the rows of each part of a layer

``qkv_proj`` is q, k and v on top of each other; ``upgate_proj`` is up and gate. The rotation of
outputs mixes the rows of all parts. So each part becomes a window on the rows of the whole, and
shares its tensors (``rows`` in :mod:`modulora_quip_sharp_e8.quantizer`).

Only layers whose dimensions are powers of two can be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models.formats import ForeignWeight, FormatReader, FormatSpec, Read
from modulora_core.spec import PackedWeight, TensorLayout
from modulora_quip_sharp_e8.codebooks import BLOCK
from modulora_quip_sharp_e8.formats.quip_params import FUSED, QuipParams, part_sizes
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, packed_of, window
from modulora_quip_sharp_e8.reference import Options, Solution

REQUIRED = ("Qidxs", "SU", "SV", "Wscale", "codebook_id")
FUSE_SCALES = "fuse_scales"

OUT_MULTIPLE, IN_MULTIPLE = 16, 64
"""Words follow the tiles of a tensor-core product of so many rows and columns."""

HADAMARD_ORDERS = (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)
"""Orders K of the published transform, in its order: the first with n / K a power of two counts."""


class Relaxml(FormatReader):
    """The reader. It keeps the whole of the last part that was read, for the other parts."""

    def __init__(self, spec: FormatSpec) -> None:
        super().__init__(spec)
        self._last: tuple[str, PackedWeight] | None = None

    def weights(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout], read: Read
    ) -> dict[str, ForeignWeight]:
        params = QuipParams.of(config)
        quantizer = QuIPSharpE8(Options.model_validate({"bits": params.book.bits}))
        found: dict[str, ForeignWeight] = {}
        for module, stored in _layers(tensors):
            rows = part_sizes(config, _leaf(module))
            shape = _check_tensors(module, stored, params, rows)
            _check_id(module, params, read)
            _scales(module, stored, rows, read)
            whole = partial(self._whole, module, stored, quantizer.options, rows)
            layout = quantizer.layout(shape).empty()
            for path, start, stop in _parts(module, shape[0], rows):
                if path in found or f"{path}.weight" in tensors:
                    raise CheckpointError(
                        f"{module}: expected {path} to be stored once, got it a second time"
                    )
                part = window(layout, start, stop).layout
                names = tuple(f"{module}.{name}" for name in stored)
                unpacked = partial(_window, whole, start, stop)
                found[path] = ForeignWeight(names, quantizer, part, unpacked)
        return found

    def _whole(
        self,
        module: str,
        stored: Mapping[str, TensorLayout],
        options: Options,
        rows: tuple[int, ...],
        read: Read,
    ) -> PackedWeight:
        if self._last is None or self._last[0] != module:
            self._last = None  # two never exist together
            input_scale, output_scale, scale = _scales(module, stored, rows, read)
            codes, residual = unpack(read(f"{module}.Qidxs"), options.bits)
            solution = Solution(codes, residual, input_scale, output_scale, scale)
            self._last = module, packed_of(solution, options)
        return self._last[1]


def _window(whole: Any, start: int, stop: int, read: Read) -> PackedWeight:
    return window(whole(read), start, stop)


# --- layers and their tensors ----------------------------------------------------------------


def _layers(tensors: Mapping[str, TensorLayout]) -> Iterator[tuple[str, dict[str, TensorLayout]]]:
    """Each quantized layer with its tensors by the last part of their names.

    The bias of a layer that is not fused is left out: it is an ordinary tensor of the model.
    """
    modules: dict[str, dict[str, TensorLayout]] = {}
    for name, layout in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = layout
    for module, stored in modules.items():
        if not any(part in stored for part in (*REQUIRED, FUSE_SCALES)):
            continue
        if _leaf(module) not in FUSED:
            stored.pop("bias", None)
        missing = [part for part in REQUIRED if part not in stored]
        if missing:
            raise CheckpointError(
                f"{module}: expected {', '.join(REQUIRED)} in the files, "
                f"got no {', '.join(missing)}; download the model again"
            )
        unknown = sorted(stored.keys() - {*REQUIRED, FUSE_SCALES})
        if unknown:
            raise ModelError(
                f"{module}.{unknown[0]}: expected {', '.join(REQUIRED)} alone for this layer, got "
                "one more tensor, whose meaning isn't implemented"
            )
        yield module, stored


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _parts(module: str, out: int, rows: tuple[int, ...]) -> Iterator[tuple[str, int, int]]:
    """The model's layers in a stored one: ``(path, start, stop)``."""
    parent = module.removesuffix(_leaf(module))
    ends = pairwise(accumulate(rows or (out,), initial=0))
    names = FUSED[_leaf(module)] if rows else (_leaf(module),)
    for name, (start, stop) in zip(names, ends, strict=True):
        yield f"{parent}{name}", start, stop


def _check_tensors(
    module: str, stored: Mapping[str, TensorLayout], params: QuipParams, rows: tuple[int, ...]
) -> tuple[int, int]:
    """``(out, in)`` of a stored layer, whose tensors agree with each other and the config."""
    qidxs, bits = stored["Qidxs"], params.book.bits
    if (
        qidxs.dtype != "int64"
        or len(qidxs.shape) != 2
        or 0 in qidxs.shape
        or qidxs.shape[0] % OUT_MULTIPLE
        or qidxs.shape[1] * 64 % (bits * IN_MULTIPLE)
    ):
        raise CheckpointError(
            f"{module}.Qidxs: expected int64 [out, in · {bits} / 64] by the codebook "
            f"{params.codebook}, out a multiple of {OUT_MULTIPLE} and in of {IN_MULTIPLE}, "
            f"got {qidxs.dtype} {list(qidxs.shape)}"
        )
    shape = qidxs.shape[0], qidxs.shape[1] * 64 // bits
    _expect(module, "SU", stored, ("float16",), [(shape[1],)])
    _expect(module, "SV", stored, ("float16",), [(shape[0],)])
    _expect(module, "Wscale", stored, ("float32",), [(), (1,)])
    _expect(module, "codebook_id", stored, ("int64",), [(), (1,)])
    if rows or FUSE_SCALES in stored:
        _expect(module, FUSE_SCALES, stored, ("float32", "float16"), [(max(1, len(rows)),)])
    if rows and sum(rows) != shape[0]:
        raise CheckpointError(
            f"{module}: expected {' + '.join(map(str, rows))} rows of "
            f"{', '.join(FUSED[_leaf(module)])} by config.json, got {shape[0]}"
        )
    check_dimension(module, "in_features", shape[1])
    check_dimension(module, "out_features", shape[0])
    return shape


def _expect(
    module: str,
    part: str,
    stored: Mapping[str, TensorLayout],
    dtypes: tuple[str, ...],
    shapes: list[tuple[int, ...]],
) -> None:
    found = stored.get(part)
    if found is None or found.dtype not in dtypes or found.shape not in shapes:
        got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(
            f"{module}.{part}: expected {' or '.join(dtypes)} {list(shapes[0])} by Qidxs and the "
            f"config, got {got}"
        )


def check_dimension(layer: str, side: str, n: int) -> None:
    """Refuse a dimension whose transform needs a Hadamard matrix of their choice.

    Raises:
        ModelError: ``n`` is no power of two.
    """
    if n & (n - 1) == 0:
        return
    K = next((K for K in HADAMARD_ORDERS if n % K == 0 and (n // K) & (n // K - 1) == 0), None)
    needs = "has no matrix of theirs"
    if K is not None:
        needs = f"needs the matrix had.{K} of Sloane's tables (n = {K} · {n // K})"
    raise ModelError(
        f"{layer}: expected a power of two as {side}, got {n}, which {needs}; that can't be read. "
        "Quantize the original model: `modulora quantize MODEL OUT -q quip-sharp-e8`"
    )


def _check_id(module: str, params: QuipParams, read: Read) -> None:
    found = int(read(f"{module}.codebook_id"))
    if found != params.book.id:
        raise ModelError(
            f"{module}.codebook_id: expected {params.book.id}, for {params.codebook} in "
            f"config.json, got {found}"
        )


def _scales(
    module: str, stored: Mapping[str, TensorLayout], rows: tuple[int, ...], read: Read
) -> tuple[Tensor, Tensor, Tensor]:
    """``input_scale``, ``output_scale`` with the factors of parts in it, and ``scale``.

    Raises:
        CheckpointError: NaN or Inf, in the files or in the products.
    """
    parts = [part for part in ("SU", "SV", "Wscale", FUSE_SCALES) if part in stored]
    values = {part: read(f"{module}.{part}") for part in parts}
    for part, value in values.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{module}.{part}: expected finite values, got NaN or Inf; the file is damaged"
            )
    output_scale = values["SV"]
    if FUSE_SCALES in values:
        counts = torch.tensor(rows or output_scale.shape)
        factors = values[FUSE_SCALES].to(torch.float32).repeat_interleave(counts)
        output_scale = (output_scale.to(torch.float32) * factors).to(torch.float16)
        if not bool(output_scale.isfinite().all()):
            raise CheckpointError(
                f"{module}.{FUSE_SCALES}: expected products with SV that fp16 can hold, got one "
                f"above {torch.finfo(torch.float16).max:g}; the file is damaged"
            )
    return values["SU"], output_scale, values["Wscale"].reshape(1)


# --- words of codes --------------------------------------------------------------------------


def unpack(words: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes of ``Qidxs``, and of the residual, in the order of rows and columns.

    A word holds four codes of E8P12. Byte i of its low half is the vector of code i. Bit
    ``4 j + i`` of its high half is bit j of the signs of code i. Code ``i = 2 c + r`` of word
    ``((t · in/64 + u) · 8 + a) · 4 + b``, counted through the tensor, is of row ``16 t + 2 a + r``
    and of the eight columns from ``64 u + 16 b + 8 c`` on. Halves and bytes are little-endian.

    Args:
        words: int64 ``[out, in · bits / 64]``: words of E8P12 codes, then of the residual's.
        bits: 2, 3 or 4.

    Returns:
        int16 ``[out, in / 8]``, the bits of unsigned codes. The same of the residual: None at 2
        bits, int16 at 4, and uint8 at 3, eight in a word.
    """
    columns = words.shape[1] * 2 // bits  # words of the first two bits in each row
    first, second = words[:, :columns], words[:, columns:]
    if bits == 2:
        return _unpack_e8p(first), None
    return _unpack_e8p(first), (
        second.contiguous().view(torch.uint8) if bits == 3 else _unpack_e8p(second)
    )


def _unpack_e8p(words: Tensor) -> Tensor:
    out, columns = words.shape[0], 32 * words.shape[1]
    T, U = out // OUT_MULTIPLE, columns // IN_MULTIPLE
    halves = words.reshape(-1).view(torch.int32).view(T, U, 8, 4, 2)  # [t, u, a, b, half]
    vectors, signs = halves.unbind(-1)
    codes = torch.empty(T, 8, 2, U, 4, 2, dtype=torch.int16)  # [t, a, r, u, b, c]
    for i in range(4):
        code = (vectors >> 8 * i & 0xFF) << 8 | _every_fourth_bit(signs >> i)
        codes[:, :, i % 2, :, :, i // 2] = code.permute(0, 2, 1, 3).to(torch.int16)  # 65535 is -1
    return codes.view(out, columns // BLOCK)


def _every_fourth_bit(x: Tensor) -> Tensor:
    """Bits 0, 4, … 28 of int32s as bits 0 to 7."""
    x = x & 0x11111111
    x = (x | x >> 3) & 0x03030303
    x = (x | x >> 6) & 0x000F000F
    return (x | x >> 12) & 0xFF
