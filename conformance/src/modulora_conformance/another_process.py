"""Packed weights through files to another process, and what that one makes of them.

The parent writes ``request.json`` (quantizer, options, layout), ``packed.safetensors`` and ``inputs.safetensors`` into a folder;
``python -m modulora_conformance.another_process FOLDER`` writes ``results.safetensors`` beside them, in each folder below ``FOLDER`` too.
Inputs are ``x.DTYPE`` ``[n, in]`` and ``dY.DTYPE`` ``[n, out]``; results ``tile.DTYPE`` (all rows) and ``part.DTYPE`` (without
the first third), of fp32 where there are no inputs, ``product.DTYPE`` and ``transposed.DTYPE``.

Options that the request names as ``before`` are used first. Where there is a ``weight.safetensors``, it is packed there, to
``packed_there.safetensors``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modulora_conformance.cases import fit, gaussian, inputs, pack, packed
from modulora_conformance.fresh_process import READY, run_python
from modulora_conformance.guarded_memory import guarded
from modulora_core.packed import PackedLayout
from modulora_core.registry import create
from modulora_core.spec import PackedWeight, Quantizer

TIMEOUT = 300
"""Seconds: importing torch and compiling kernels, on a busy machine."""

ROWS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What another process makes of a packed weight, and of the weight itself.

    Attributes:
        tile: all rows of what the packed one stands for, fp32; packed: what it was packed to there.
    """

    tile: Tensor
    packed: PackedWeight


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def inputs_for(shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> dict[str, Tensor]:
    """Inputs of both products in each dtype, by their names in the file."""
    out_features, in_features = shape
    forward = {f"x.{name_of(dtype)}": inputs((ROWS,), in_features, dtype, 1) for dtype in dtypes}
    return forward | {
        f"dY.{name_of(dtype)}": inputs((ROWS,), out_features, dtype, 2) for dtype in dtypes
    }


def read_elsewhere(
    quantizer: Quantizer,
    weight: PackedWeight,
    given: Mapping[str, Tensor],
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Tiles and products that another process computes from the files.

    Args:
        given: what :func:`inputs_for` gives; folder: an empty one; environment: variables to set there.

    Returns:
        the results by name. The check fails with the last line that the process wrote where it fails.
    """
    write_request(quantizer, weight, given, folder)
    answer(folder, environment)
    return results_in(folder)


def answered(
    quantizer: Quantizer, shape: tuple[int, int], before: Sequence[Mapping[str, Any]]
) -> Answer:
    """What another process makes of :func:`modulora_conformance.cases.packed` of this shape, and of the weight that it is of, after it
    has used the options in ``before``. It is asked once for the same arguments. The check fails where the process does.
    """
    options = quantizer.options.model_dump_json()
    return _answered(type(quantizer), options, shape, json.dumps(list(before)))


@lru_cache(maxsize=8)
def _answered(cls: type[Quantizer], options: str, shape: tuple[int, int], before: str) -> Answer:
    quantizer = cls(cls.Options.model_validate_json(options))
    here = packed(quantizer, shape)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_request(quantizer, here, inputs_for(here.shape, (torch.float32,)), folder,
                      dense=gaussian(here.shape, 0), before=json.loads(before))  # fmt: skip
        answer(folder)
        return Answer(results_in(folder)["tile.float32"], packed_in(folder))


def write_request(
    quantizer: Quantizer,
    weight: PackedWeight,
    given: Mapping[str, Tensor],
    folder: Path,
    *,
    at_the_end_of_memory: bool = False,
    dense: Tensor | None = None,
    before: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Ask for ``weight`` to be read and multiplied.

    Args:
        at_the_end_of_memory: with nothing readable behind its tensors' last bytes.
        dense: one to be packed, for :func:`packed_in`.
        before: options with which a small weight is packed and read first.
    """
    request = {"quantizer": quantizer.spec.name, "options": quantizer.options.model_dump(mode="json"),
               "layout": weight.layout.to_json(), "guarded": at_the_end_of_memory, "before": list(before)}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(json.dumps(request))
    save_file(dict(weight.tensors), folder / "packed.safetensors")
    save_file(dict(given), folder / "inputs.safetensors")
    if dense is not None:
        save_file({"weight": dense}, folder / "weight.safetensors")


def answer(folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Let another process, with ``environment`` beside this one's, do what is asked for in ``folder``. The check fails where it fails.

    Strings have other hashes there than here.
    """
    hashes = {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    done = run_python(
        "-m", "modulora_conformance.another_process", str(folder), cwd=folder, timeout=TIMEOUT,
        env=os.environ | hashes | dict(environment or {}), ready=(*READY, "pytest", "modulora_conformance.cases"),
    )  # fmt: skip
    if done.returncode != 0:
        ended = f"a process that ended with {done.returncode}"
        last = (done.stderr.strip().splitlines() or [ended])[-1]
        pytest.fail(
            f"expected another process to read the packed weight from files, got: {last}",
            pytrace=False,
        )


def results_in(folder: Path) -> dict[str, Tensor]:
    """The answer by name."""
    results: dict[str, Tensor] = load_file(folder / "results.safetensors")
    return results


def packed_in(folder: Path) -> PackedWeight:
    """What became of the weight that was to be packed."""
    with safe_open(folder / "packed_there.safetensors", "pt") as file:
        layout = PackedLayout.from_json(json.loads(file.metadata()["layout"]))
    return layout.fill(load_file(folder / "packed_there.safetensors"))


def main(folder: Path) -> None:
    """Read the requests and write the results."""
    for request in sorted(folder.rglob("request.json")):
        _read(request.parent, json.loads(request.read_text()))


def _read(folder: Path, request: Mapping[str, Any]) -> None:
    for options in request["before"]:
        _use(request["quantizer"], options, request["layout"]["shape"])
    quantizer = create(request["quantizer"], request["options"])
    layout = PackedLayout.from_json(request["layout"])
    quantizer.check_format(layout)
    tensors = load_file(folder / "packed.safetensors")
    if request["guarded"]:
        tensors = {name: guarded(tensor) for name, tensor in tensors.items()}
    weight = layout.fill(tensors)
    operands = load_file(folder / "inputs.safetensors")
    results: dict[str, Tensor] = {}
    for dtype in {given.dtype for given in operands.values()} or {torch.float32}:
        for what, start in (("tile", 0), ("part", weight.shape[0] // 3)):
            rows = (start, weight.shape[0])
            results[f"{what}.{name_of(dtype)}"] = quantizer.dequantize_tile(
                weight, rows, dtype
            ).contiguous()
    for name, given in operands.items():
        operand, _, dtype_name = name.partition(".")
        transpose = operand == "dY"
        result = quantizer.matmul(given, weight, transpose)
        results[f"transposed.{dtype_name}" if transpose else f"product.{dtype_name}"] = (
            result.contiguous()
        )
    save_file(results, folder / "results.safetensors")
    if (folder / "weight.safetensors").exists():
        there = pack(quantizer, load_file(folder / "weight.safetensors")["weight"].clone())
        save_file(
            dict(there.tensors),
            folder / "packed_there.safetensors",
            {"layout": json.dumps(there.layout.to_json())},
        )


def _use(name: str, options: Mapping[str, Any], shape: tuple[int, int]) -> None:
    """Pack and read a weight with other options. Whether that works is for a run of theirs to say."""
    with suppress(Exception):
        quantizer = create(name, options)
        weight = pack(quantizer, gaussian(fit(quantizer, *shape), 1))
        quantizer.dequantize_tile(weight, (0, weight.shape[0]), torch.float32)
        quantizer.matmul(torch.ones(1, weight.shape[1]), weight)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
