"""Published QuIP# checkpoints, relaxml's E8P-2Bit and E8PRVQ-3Bit and -4Bit, as weights of this plugin. They are only read.

Each quantized layer ``M``, whose weight is ``[out, in]``, is stored as (:mod:`modulora_quip_sharp_e8.relaxml_words` has the
arrangement of the words)::

    M.Qidxs         int64 [out, in · bits / 64]    codes
    M.SU, M.SV      fp16  [in], [out]              scales of inputs and outputs, signs at first
    M.Wscale        fp32                           what one unit of the codebook is
    M.codebook_id   int64
    M.fuse_scales   [parts]                        one factor for the rows of each part of a fused layer

``qkv_proj`` is q, k and v on top of each other, ``upgate_proj`` is up and gate. The rotation of outputs mixes the rows of all
parts, so each becomes a window on the rows of the whole, and shares its tensors (``rows`` in
:mod:`modulora_quip_sharp_e8.quantizer`). Only layers whose dimensions are powers of two can be read.
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
from modulora_quip_sharp_e8 import relaxml_words
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, from_solution, window
from modulora_quip_sharp_e8.reference import Solution
from modulora_quip_sharp_e8.relaxml_config import FUSED, QuipParams, check_dimension, part_sizes

REQUIRED = ("Qidxs", "SU", "SV", "Wscale", "codebook_id")
FUSE_SCALES = "fuse_scales"


class Relaxml(FormatReader):
    """The reader. The whole that parts were last asked of is kept, so that it is converted once for all of them."""

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
            rows = _rows(config, module)
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
                unpack = partial(_unpack, whole, start, stop)
                names = tuple(f"{module}.{part}" for part in stored)
                found[path] = ForeignWeight(
                    names, quantizer, window(layout, start, stop).layout, unpack
                )
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
            codes, residual = relaxml_words.unpack(read(f"{module}.Qidxs"), options.bits)
            solution = Solution(codes, residual, input_scale, output_scale, scale)
            self._last = module, from_solution(solution, options)
        return self._last[1]


def _unpack(whole: Any, start: int, stop: int, read: Read) -> PackedWeight:
    return window(whole(read), start, stop)


def _layers(tensors: Mapping[str, TensorLayout]) -> Iterator[tuple[str, dict[str, TensorLayout]]]:
    """Each quantized layer with its tensors by the last part of their names, but for the bias of one that isn't fused."""
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
            raise CheckpointError(f"{module}: expected {', '.join(REQUIRED)} in the files, got no {', '.join(missing)}; "
                                  "download the model again")  # fmt: skip
        unknown = sorted(stored.keys() - {*REQUIRED, FUSE_SCALES})
        if unknown:
            raise ModelError(f"{module}.{unknown[0]}: the files have it beside the layer's {', '.join(REQUIRED)}, and what it means "
                             "isn't implemented")  # fmt: skip
        yield module, stored


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _rows(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """How many rows each part of a fused layer has; nothing for one that isn't."""
    return part_sizes(config, _leaf(module)) if _leaf(module) in FUSED else ()


def _parts(module: str, out_features: int, rows: tuple[int, ...]) -> Iterator[tuple[str, int, int]]:
    """The model's layers that a stored one is: ``(path, start, stop)``."""
    if not rows:
        yield module, 0, out_features
        return
    parent = module.removesuffix(_leaf(module))
    for name, (start, stop) in zip(
        FUSED[_leaf(module)], pairwise(accumulate(rows, initial=0)), strict=True
    ):
        yield f"{parent}{name}", start, stop


def _check_tensors(
    module: str, stored: Mapping[str, TensorLayout], params: QuipParams, rows: tuple[int, ...]
) -> tuple[int, int]:
    """``(out, in)`` of the layer as it is stored, whose tensors agree with each other and the config."""
    out_multiple, in_multiple = relaxml_words.OUT_MULTIPLE, relaxml_words.IN_MULTIPLE
    qidxs, bits = stored["Qidxs"], params.book.bits
    if (
        qidxs.dtype != "int64"
        or len(qidxs.shape) != 2
        or 0 in qidxs.shape
        or qidxs.shape[0] % out_multiple
        or qidxs.shape[1] * 64 % (bits * in_multiple)
    ):
        raise CheckpointError(
            f"{module}.Qidxs: expected int64 [out, in · {bits} / 64] by the codebook {params.codebook}, out a multiple of "
            f"{out_multiple} and in of {in_multiple}, got {qidxs.dtype} {list(qidxs.shape)}"
        )
    out_features, in_features = qidxs.shape[0], qidxs.shape[1] * 64 // bits
    _expect(module, "SU", stored, ("float16",), [(in_features,)])
    _expect(module, "SV", stored, ("float16",), [(out_features,)])
    _expect(module, "Wscale", stored, ("float32",), [(), (1,)])
    _expect(module, "codebook_id", stored, ("int64",), [(), (1,)])
    if rows or FUSE_SCALES in stored:
        _expect(module, FUSE_SCALES, stored, ("float32", "float16"), [(max(1, len(rows)),)])
    if rows and sum(rows) != out_features:
        raise CheckpointError(f"{module}: expected {' + '.join(map(str, rows))} rows of {', '.join(FUSED[_leaf(module)])} by "
                              f"config.json, got {out_features}")  # fmt: skip
    check_dimension(module, "in_features", in_features)
    check_dimension(module, "out_features", out_features)
    return out_features, in_features


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
        raise CheckpointError(f"{module}.{part}: expected {' or '.join(dtypes)} {list(shapes[0])} by Qidxs and the config, "
                              f"got {got}")  # fmt: skip


def _check_id(module: str, params: QuipParams, read: Read) -> None:
    found = int(read(f"{module}.codebook_id"))
    if found != params.book.id:
        raise ModelError(
            f"{module}.codebook_id: expected {params.book.id}, that of {params.codebook} in config.json, got {found}"
        )


def _scales(
    module: str, stored: Mapping[str, TensorLayout], rows: tuple[int, ...], read: Read
) -> tuple[Tensor, Tensor, Tensor]:
    """``input_scale`` fp16 ``[in]``, ``output_scale`` fp16 ``[out]`` with the factors of parts in it, ``scale`` fp32 ``[1]``.

    Raises:
        CheckpointError: NaN or Inf, in the files or in what is to be stored.
    """
    values = {
        part: read(f"{module}.{part}")
        for part in ("SU", "SV", "Wscale", FUSE_SCALES)
        if part in stored
    }
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
            raise CheckpointError(f"{module}.{FUSE_SCALES}: expected products with SV that fp16 can hold, got one above "
                                  f"{torch.finfo(torch.float16).max:g}; the file is damaged")  # fmt: skip
    return values["SU"], output_scale, values["Wscale"].reshape(1)
