"""Keeps golden vectors: weights in files, with their packed bytes and their Ŵ.

They hold a format still: an old checkpoint keeps its meaning, and a new version packs the same
bytes. Each plugin has its own, in a folder that its subclass names (``golden =
Path(__file__).parent / "golden"``). Write them once with ``python -m modulora_conformance.golden
NAME DIR``, and commit them.

A file ``NAME-OPTIONS.safetensors`` holds ``weight`` fp32 ``[out, in]``, ``tile`` fp32 ``[out,
in]``, ``packed.NAME`` for each packed tensor, and the layout as JSON in its metadata."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modulora_conformance.cases import fit, heavy_tailed, pack, tile
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.packing import DETERMINISTIC
from modulora_conformance.oracle import relative_error
from modulora_core.errors import CheckpointError
from modulora_core.packed import PackedLayout, PackedWeight
from modulora_core.spec import Quantizer

SHAPE = (24, 160)

TILE_ERROR = 2e-6
"""The relative error of a tile that is a sum: kernels may sum in another order. Others are
exact."""


class Golden(Level):
    """Golden vectors are packed to the stored bytes, and read as the stored values."""

    level, title = "L1", "packing"

    @needs(DETERMINISTIC)
    def test_packing_gives_the_golden_vectors(self, quantizer, golden_folder):
        """If this fails: the installed version packs other bytes than the golden vectors have.

        If you intend that, write them again. If stored bytes mean something else now, raise
        `format`."""
        path = file_of(quantizer, golden_folder)
        weight, stored, _ = read(path)
        assert stored.format == quantizer.format, f"{path.name}: {_raised(quantizer, stored)}"
        found = pack(quantizer, weight)
        assert found.layout == stored.layout, (
            f"{path.name}: expected {stored.layout}, got {found.layout}"
        )
        tensors = stored.tensors.items()
        differing = [name for name, t in tensors if not torch.equal(found.tensors[name], t)]
        assert not differing, (
            f"{path.name}: expected the stored bytes, got others in {', '.join(differing)}"
        )

    def test_tiles_give_the_golden_vectors(self, quantizer, measurements, golden_folder):
        """If this fails: the installed version reads other values from the bytes of an earlier one.

        Published checkpoints would change their meaning.
        """
        path = file_of(quantizer, golden_folder)
        _, stored, expected = read(path)
        try:
            quantizer.check_format(stored)
        except CheckpointError:  # the check before has failed
            pytest.skip(f"{path.name} has an old format: {_raised(quantizer, stored)}")
        error = relative_error(tile(quantizer, stored), expected)
        measurements.at_most("distance from the golden tile", error, TILE_ERROR, case=path.name)


def _raised(quantizer: Quantizer, stored: PackedWeight) -> str:
    return (
        f"format {stored.format} -> {quantizer.format}: write the golden vectors again: "
        f"python -m modulora_conformance.golden {quantizer.spec.name} DIR"
    )


def file_of(quantizer: Quantizer, folder: Path) -> Path:
    """The path of the golden vectors of a quantizer with its options."""
    chosen = quantizer.options.model_dump(mode="json", exclude_defaults=True)
    title = "-".join([quantizer.spec.name, *(f"{name}={value}" for name, value in chosen.items())])
    return folder / f"{re.sub(r'[^A-Za-z0-9=._-]', '_', title)}.safetensors"


def read(path: Path) -> tuple[Tensor, PackedWeight, Tensor]:
    """The weight, its packed form, and its tile, from a golden file."""
    with safe_open(path, "pt") as file:
        layout = PackedLayout.from_json(json.loads(file.metadata()["layout"]))
    tensors = load_file(path)
    packed = {name: tensors[f"packed.{name}"] for name in layout.tensors}
    return tensors["weight"], layout.fill(packed), tensors["tile"]


def write(quantizer: Quantizer, folder: Path) -> Path:
    """Write the golden vectors of a quantizer with its options. Returns the file."""
    weight = heavy_tailed(fit(quantizer, *SHAPE), 42)
    packed = pack(quantizer, weight)
    path = file_of(quantizer, folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"weight": weight, "tile": tile(quantizer, packed)}
    tensors |= {f"packed.{name}": tensor for name, tensor in packed.tensors.items()}
    save_file(tensors, path, {"layout": json.dumps(packed.layout.to_json())})
    return path


def main(arguments: list[str]) -> int:
    """Write the golden vectors of every configuration that a quantizer's spec promises."""
    from modulora_conformance.pytest_plugin import configurations
    from modulora_core.registry import create

    if len(arguments) != 2:
        print("usage: python -m modulora_conformance.golden NAME DIR", file=sys.stderr)
        return 2
    name, folder = arguments
    for configuration in configurations(name, []):
        print(write(create(name, configuration.options), Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
