"""Keeps the second moments of gradients in the files of an unfinished folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from modulora_core import distributed
from modulora_core.checkpoints.written.outputs import write_file
from modulora_core.models.sites import LinearSite


@dataclass(frozen=True, slots=True)
class OutputMoments:
    """H_O = E[ggᵀ / ‖g‖] of the layers whose quantizers use it, in fp16, a file for each.

    Attributes:
        folder: the folder of the files. In a distributed run all processes see it.
        names: the parameters that have one.
    """

    folder: Path
    names: frozenset[str]

    def write(self, name: str, moment: Tensor) -> None:
        """Keep H_O of a parameter, ``[out, out]``. Only the first process writes."""
        if distributed.is_first():
            largest = moment.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            scaled = (moment / largest).to("cpu", torch.float16)  # only its ratios matter
            write_file(self._file(name), safetensors.torch.save({"moment": scaled}))

    def read(self, name: str) -> Tensor | None:
        """H_O of a parameter, fp32 on the CPU, its largest value 1; None if it has none."""
        if name not in self.names:
            return None
        moment: Tensor = safetensors.torch.load_file(self._file(name))["moment"]
        return moment.float()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def moment_bytes(site: LinearSite) -> int:
    """The size of one file's tensor."""
    return int(site.out_features) ** 2 * torch.float16.itemsize
