"""Packed weights through files to another process, and what that one makes of them.

The parent writes ``request.json`` (quantizer, options, layout), ``packed.safetensors`` and ``inputs.safetensors`` into a folder;
``python -m modulora_conformance.another_process FOLDER`` writes ``results.safetensors`` beside them, in each folder below ``FOLDER`` too.
Inputs are ``x.DTYPE`` ``[n, in]`` and ``dY.DTYPE`` ``[n, out]``; results ``tile.DTYPE`` (all rows) and ``part.DTYPE`` (without
the first third), of fp32 where there are no inputs, ``product.DTYPE`` and ``transposed.DTYPE``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modulora_conformance.cases import inputs
from modulora_conformance.fresh_process import READY, run_python
from modulora_conformance.guarded_memory import guarded
from modulora_core.packed import PackedLayout
from modulora_core.registry import create
from modulora_core.spec import PackedWeight, Quantizer

TIMEOUT = 300
"""Seconds: importing torch and compiling kernels, on a busy machine."""

ROWS = 3


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def inputs_for(shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> dict[str, Tensor]:
    """Inputs of both products in each dtype, by their names in the file."""
    out_features, in_features = shape
    forward = {f"x.{name_of(dtype)}": inputs((ROWS,), in_features, dtype, 1) for dtype in dtypes}
    return forward | {f"dY.{name_of(dtype)}": inputs((ROWS,), out_features, dtype, 2) for dtype in dtypes}


def read_elsewhere(
    quantizer: Quantizer,
    packed: PackedWeight,
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
    write_request(quantizer, packed, given, folder)
    answer(folder, environment)
    return results_in(folder)


def write_request(
    quantizer: Quantizer,
    packed: PackedWeight,
    given: Mapping[str, Tensor],
    folder: Path,
    *,
    at_the_end_of_memory: bool = False,
) -> None:
    """Ask for ``packed`` to be read and multiplied; ``at_the_end_of_memory``: with nothing readable behind its tensors' last bytes."""
    request = {"quantizer": quantizer.spec.name, "options": quantizer.options.model_dump(mode="json"),
               "layout": packed.layout.to_json(), "guarded": at_the_end_of_memory}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(json.dumps(request))
    save_file(dict(packed.tensors), folder / "packed.safetensors")
    save_file(dict(given), folder / "inputs.safetensors")


def answer(folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Let another process, with ``environment`` beside this one's, do what is asked for in ``folder``. The check fails where it fails."""
    done = run_python(
        "-m", "modulora_conformance.another_process", str(folder), cwd=folder, timeout=TIMEOUT,
        env=os.environ | dict(environment or {}), ready=(*READY, "modulora_conformance.cases"),
    )  # fmt: skip
    if done.returncode != 0:
        ended = f"a process that ended with {done.returncode}"
        last = (done.stderr.strip().splitlines() or [ended])[-1]
        pytest.fail(
            f"expected another process to read the packed weight from files, got: {last}", pytrace=False
        )


def results_in(folder: Path) -> dict[str, Tensor]:
    """The answer by name."""
    results: dict[str, Tensor] = load_file(folder / "results.safetensors")
    return results


def main(folder: Path) -> None:
    """Read the requests and write the results."""
    for request in sorted(folder.rglob("request.json")):
        _read(request.parent, json.loads(request.read_text()))


def _read(folder: Path, request: Mapping[str, Any]) -> None:
    quantizer = create(request["quantizer"], request["options"])
    layout = PackedLayout.from_json(request["layout"])
    quantizer.check_format(layout)
    tensors = load_file(folder / "packed.safetensors")
    if request["guarded"]:
        tensors = {name: guarded(tensor) for name, tensor in tensors.items()}
    packed = layout.fill(tensors)
    operands = load_file(folder / "inputs.safetensors")
    results: dict[str, Tensor] = {}
    for dtype in {given.dtype for given in operands.values()} or {torch.float32}:
        for what, start in (("tile", 0), ("part", packed.shape[0] // 3)):
            rows = (start, packed.shape[0])
            results[f"{what}.{name_of(dtype)}"] = quantizer.dequantize_tile(packed, rows, dtype)
    for name, given in operands.items():
        operand, _, dtype_name = name.partition(".")
        transpose = operand == "dY"
        result = quantizer.matmul(given, packed, transpose)
        results[f"transposed.{dtype_name}" if transpose else f"product.{dtype_name}"] = result.contiguous()
    save_file(results, folder / "results.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
