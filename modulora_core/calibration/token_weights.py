"""Weights the tokens of a calibration by the loss, and keeps the weights for a resumed run.

A quantizer then spends its bits on errors that the loss notices: H = E[w xxᵀ]. Kim et al. 2025
(GuidedQuant, arXiv 2505.07004, section 3) have w = ‖g‖² / E‖g‖². Here it is ‖g‖ / E‖g‖: in value
projections the first token of each sample has by far the largest ‖g‖², so that squares leave few
tokens, and a noisy H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from modulora_core import distributed
from modulora_core.calibration.gradients import Sensitivity, scale_to_mean_one
from modulora_core.checkpoints.written.outputs import write_file

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
