"""Golden vectors: weights with the bytes that they were packed to and the values that they stood for, kept in files.

They hold a format still: a checkpoint of last year must be read as it was, and a new version must pack the same bytes. Each plugin
keeps its own, in a folder that its subclass names (``golden = Path(__file__).parent / "golden"``). Write them once with
``python -m modulora_conformance.golden NAME DIR``, look at them, commit them.

A file ``NAME-OPTIONS.safetensors`` holds ``weight`` fp32 ``[out, in]``, ``tile`` fp32 ``[out, in]``, ``packed.NAME`` for each packed
tensor, and in its metadata ``layout`` as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modulora_conformance.cases import fit, heavy_tailed, pack
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.oracle import relative_error
from modulora_core.errors import CheckpointError
from modulora_core.packed import PackedLayout, PackedWeight
from modulora_core.spec import Quantizer

SHAPE = (24, 160)

TILE_ERROR = 2e-6
"""A tile against the one that was stored: kernels may sum in another order where a tile is a sum, and in nothing else."""


class Golden(Level):
    level, title = "L1", "packing"

    @needs("test_packing_is_deterministic")
    def test_packing_gives_the_golden_vectors(
        self, quantizer: Quantizer, golden_folder: Path
    ) -> None:
        """If this fails: the installed version packs other bytes than the one that wrote the golden vectors. If that is meant, write
        them anew, and raise `format` where stored weights mean something else now.
        """
        path = file_of(quantizer, golden_folder)
        weight, stored, _ = read(path)
        assert stored.format == quantizer.format, f"{path.name}: {_raised(quantizer, stored)}"
        found = pack(quantizer, weight)
        assert found.layout == stored.layout, (
            f"{path.name}: expected {stored.layout}, got {found.layout}"
        )
        differing = [
            name
            for name, tensor in stored.tensors.items()
            if not torch.equal(found.tensors[name], tensor)
        ]
        assert differing == [], (
            f"{path.name}: expected the stored bytes, got others in {', '.join(differing)}"
        )

    def test_tiles_give_the_golden_vectors(
        self, quantizer: Quantizer, measurements: Measurements, golden_folder: Path
    ) -> None:
        """If this fails: the installed version reads other values from bytes that an earlier one wrote: published checkpoints would
        change their meaning.
        """
        path = file_of(quantizer, golden_folder)
        _, stored, tile = read(path)
        try:
            quantizer.check_format(stored)
        except CheckpointError:  # then the check before has failed
            pytest.skip(f"{path.name} isn't read any more: {_raised(quantizer, stored)}")
        found = quantizer.dequantize_tile(stored, (0, stored.shape[0]), torch.float32)
        measurements.at_most(
            "distance from the golden tile", relative_error(found, tile), TILE_ERROR, case=path.name
        )


def _raised(quantizer: Quantizer, stored: PackedWeight) -> str:
    return (
        f"format {stored.format} -> {quantizer.format}: write the golden vectors anew: "
        f"python -m modulora_conformance.golden {quantizer.spec.name} DIR"
    )


def file_of(quantizer: Quantizer, folder: Path) -> Path:
    """Where the golden vectors of a quantizer with its options are."""
    chosen = quantizer.options.model_dump(mode="json", exclude_defaults=True)
    title = "-".join([quantizer.spec.name, *(f"{name}={value}" for name, value in chosen.items())])
    return folder / f"{re.sub(r'[^A-Za-z0-9=._-]', '_', title)}.safetensors"


def read(path: Path) -> tuple[Tensor, PackedWeight, Tensor]:
    """The weight, its packed form, and its tile, of a golden file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        layout = PackedLayout.from_json(json.loads(file.metadata()["layout"]))
    packed = {
        name.removeprefix("packed."): tensor
        for name, tensor in tensors.items()
        if name.startswith("packed.")
    }
    return tensors["weight"], layout.fill(packed), tensors["tile"]


def write(quantizer: Quantizer, folder: Path) -> Path:
    """Write the golden vectors of a quantizer with its options. Returns the file."""
    weight = heavy_tailed(fit(quantizer, *SHAPE), 42)
    packed = pack(quantizer, weight)
    tile = quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.float32)
    path = file_of(quantizer, folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "weight": weight,
        "tile": tile,
        **{f"packed.{name}": tensor for name, tensor in packed.tensors.items()},
    }
    save_file(tensors, path, {"layout": json.dumps(packed.layout.to_json())})
    return path


def main(arguments: list[str]) -> int:
    """Write the golden vectors of every configuration that a quantizer's spec makes promises for."""
    from modulora_conformance.configurations import configurations
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
