"""Keeps token weights and gradients' second moments in files, for a resumed run.

A quantizer then spends its bits on errors that the loss notices: H = E[w xxᵀ]. Kim et al. 2025
(GuidedQuant, arXiv 2505.07004, section 3) have w = ‖g‖² / E‖g‖². Here it is ‖g‖ / E‖g‖: in value
projections the first token of each sample has by far the largest ‖g‖², so that squares leave few
tokens, and a noisy H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from modulora_core import distributed
from modulora_core.calibration.gradients import Sensitivity, scale_to_mean_one
from modulora_core.checkpoints.outputs import write_file
from modulora_core.models.sites import LinearSite

WEIGHTS = "token-weights-{}-of-{}.safetensors"
"""The file with the token weights of one process's samples."""


def token_weights(
    ids: Tensor, folder: Path, measure: Callable[[], Mapping[str, Sequence[Sensitivity]]]
) -> dict[str, list[tuple[Tensor, ...]]]:
    """‖gₜ‖ / E‖g‖ of each parameter that multiplies every token once, for this process's samples.

    A file in ``folder`` keeps the weights for a resumed run of the same arguments.

    Args:
        ids: all samples, int64 ``[samples, seq_len]``.
        measure: gives :func:`loss_sensitivities` of these samples, for parameters of one matrix.

    Returns:
        by parameter name, in a list for its only matrix: the weights of each sample,
        fp32 ``[seq_len]``, with a mean of 1 over all samples.
    """
    folder.mkdir(exist_ok=True)
    file = folder / WEIGHTS.format(distributed.rank(), distributed.world_size())
    if not all(distributed.merged({str(distributed.rank()): file.is_file()}).values()):
        numbers = distributed.shared_out(range(len(ids)))
        roots = {}
        for name, (each,) in measure().items():
            if all(len(weights) == ids.shape[1] for weights in each.tokens):
                root = torch.stack(each.tokens).double().sqrt()
                roots[name] = (root * scale_to_mean_one(root.unbind(), numbers)).float()
        write_file(file, safetensors.torch.save(roots))
    return {name: [each.unbind()] for name, each in safetensors.torch.load_file(file).items()}


@dataclass(frozen=True, slots=True)
class OutputMoments:
    """H_O = E[ggᵀ / ‖g‖] of the layers whose quantizers use it, in fp16, a file for each.

    Attributes:
        folder: the folder of the files. In a distributed run all processes see it.
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
