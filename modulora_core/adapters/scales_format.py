"""Channel scales on disk: ``modulora_scales.safetensors``, beside an adapter's A and B.

    <module>.input_scale      u, [in]       float32
    <module>.output_scale     v, [out]      float32

Both are there for each module of the adapter, whose weight is diag(v) Ŵ diag(u) + s · B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from modulora_core.checkpoints.outputs import write_file
from modulora_core.errors import AdapterError
from modulora_core.packed import ChannelScales

SCALES_FILE = "modulora_scales.safetensors"


def write_scales(folder: Path, scales: Mapping[str, ChannelScales]) -> None:
    """Write the scales of each module; where there are none, no file is left."""
    file = folder / SCALES_FILE
    if not scales:
        file.unlink(missing_ok=True)
        return
    tensors = {
        name: vector.detach().to("cpu", torch.float32).contiguous()
        for module, of in scales.items()
        for name, vector in (
            (f"{module}.input_scale", of.input),
            (f"{module}.output_scale", of.output),
        )
    }
    write_file(file, safetensors.torch.save(tensors, metadata={"format": "pt"}))


class ScalesFile:
    """The scales of an adapter folder, read when they are asked for.

    Args:
        folder: of the adapter.
        shapes: ``(out, in)`` of each of the adapter's modules.

    Raises:
        AdapterError: there is no such file, it can't be read, or it holds anything but the two vectors of each module.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        path = folder / SCALES_FILE
        try:
            self._file = safe_open(path, framework="pt")
            found = {name: self._layout(name) for name in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{path}: expected the adapter's channel scales, got no readable safetensors file: {error}; "
                "fetch the adapter again, whole"
            ) from None
        expected = {
            f"{module}.{kind}_scale": ("F32", [length])
            for module, (out_features, in_features) in shapes.items()
            for kind, length in (("input", in_features), ("output", out_features))
        }
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise AdapterError(
                    f"{path}: {name}: expected {_in_words(expected.get(name))}, got {_in_words(found.get(name))}"
                )

    def _layout(self, name: str) -> tuple[str, list[int]]:
        tensor = self._file.get_slice(name)
        return tensor.get_dtype(), list(tensor.get_shape())

    def __getitem__(self, module: str) -> ChannelScales:
        u, v = (self._file.get_tensor(f"{module}.{kind}_scale") for kind in ("input", "output"))
        return ChannelScales(u, v)


def _in_words(layout: tuple[str, list[int]] | None) -> str:
    return "none" if layout is None else f"{layout[0]} {layout[1]}"
