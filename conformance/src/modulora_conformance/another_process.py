"""A packed weight through files to another process, and what that one makes of it.

The parent writes ``request.json`` (quantizer, options, layout), ``packed.safetensors`` and ``inputs.safetensors`` into a folder;
``python -m modulora_conformance.another_process FOLDER`` writes ``results.safetensors`` beside them. Inputs are ``x.DTYPE`` ``[n, in]``
and ``dY.DTYPE`` ``[n, out]``; results ``tile.DTYPE`` (all rows), ``product.DTYPE`` and ``transposed.DTYPE``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modulora_conformance.cases import inputs
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
    request = {"quantizer": quantizer.spec.name, "options": quantizer.options.model_dump(mode="json"),
               "layout": packed.layout.to_json()}  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    save_file(dict(packed.tensors), folder / "packed.safetensors")
    save_file(dict(given), folder / "inputs.safetensors")
    command = [sys.executable, "-m", "modulora_conformance.another_process", str(folder)]
    done = subprocess.run(
        command,
        env=os.environ | dict(environment or {}),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        pytest.fail(
            f"expected another process to read the packed weight from files, got: {last}", pytrace=False
        )
    results: dict[str, Tensor] = load_file(folder / "results.safetensors")
    return results


def main(folder: Path) -> None:
    """Read the request and write the results."""
    request = json.loads((folder / "request.json").read_text())
    quantizer = create(request["quantizer"], request["options"])
    layout = PackedLayout.from_json(request["layout"])
    quantizer.check_format(layout)
    packed = layout.fill(load_file(folder / "packed.safetensors"))
    results: dict[str, Tensor] = {}
    for name, given in load_file(folder / "inputs.safetensors").items():
        operand, _, dtype = name.partition(".")
        results[f"tile.{dtype}"] = quantizer.dequantize_tile(packed, (0, packed.shape[0]), given.dtype)
        transpose = operand == "dY"
        result = quantizer.matmul(given, packed, transpose)
        results[f"transposed.{dtype}" if transpose else f"product.{dtype}"] = result.contiguous()
    save_file(results, folder / "results.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
