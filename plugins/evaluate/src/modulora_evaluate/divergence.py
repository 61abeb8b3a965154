"""Compare the predictions of two models on text, such as a merged file's with its adapter's.

    KL(P ‖ Q) = 1/N Σ_t Σ_v P(v | x<t) log (P(v | x<t) / Q(v | x<t))      N tokens, in nats

P is the model with the adapter. Q is the other model, or the model without its adapter: that
divergence is the whole effect of the adapter.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from modulora_core.errors import OptionError, WorkError
from modulora_core.inference.opened import Opened
from modulora_core.lora.adapted import without_adapter
from modulora_core.models.config import vocabulary_of
from modulora_core.progress import Progress, no_progress
from modulora_evaluate.evaluate import perplexity_of
from modulora_evaluate.passes import batches, evaluating

_ROWS = 64
"""Positions whose log-probabilities exist at once."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The two models on the same text.

    Attributes:
        kl_divergence: KL(P ‖ Q) to the other model; kl_of_adapter: to P without its adapter, None
            without one; both in nats a token.
        perplexity: the other model's; perplexity_before: P's; perplexity_of_base: without adapter.
    """

    kl_divergence: float
    kl_of_adapter: float | None
    perplexity: float
    perplexity_before: float
    perplexity_of_base: float
    tokens: int

    @property
    def is_lost(self) -> bool:
        """Whether the other model is further from P than half of the adapter's effect."""
        return self.kl_of_adapter is not None and self.kl_divergence > self.kl_of_adapter / 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def divergence(
    before: Opened, other: Opened, ids: Tensor, *, progress: Progress = no_progress
) -> Divergence:
    """Measure how far ``other`` is from ``before``, which may have an adapter.

    Args:
        before, other: results of :func:`modulora_core.open_to_run`; both are loaded at once.
        ids: segments of text, int64 ``[n, seq_len]`` (:func:`modulora_core.data.token_segments`).

    Raises:
        OptionError: a model has a shorter window, or the two have different vocabularies.
        WorkError: logits are NaN or infinite.
    """
    for each in (before, other):
        if each.window is not None and each.window < ids.shape[1]:
            raise OptionError(
                f"seq_len {ids.shape[1]}: expected at most the window of {each.name}, "
                f"{each.window} tokens"
            )
    P, Q = before.load(), other.load()
    sizes = vocabulary_of(P.config), vocabulary_of(Q.config)
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"{other.name}: expected the {sizes[0]} tokens of {before.name}, got {sizes[1]}; give "
            "two forms of the same model"
        )
    sums = torch.zeros(5, dtype=torch.float64)  # KL to Q, KL to the base, -log of Q, P, base
    with evaluating(P), evaluating(Q):
        for _, batch in batches(ids, 1, progress):
            p, q = _logits(P, batch), _logits(Q, batch)
            base = p
            if before.adapter is not None:
                with without_adapter(P):
                    base = _logits(P, batch)
            sums += _sums(p, q, base, batch[0, 1:])
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    kl, effect, nll, nll_before, nll_of_base = (sums / tokens).tolist()
    if not math.isfinite(kl + effect + nll):
        raise WorkError("divergence: expected finite logits, got NaN or Inf")
    return Divergence(
        kl, None if before.adapter is None else effect, perplexity_of(nll),
        perplexity_of(nll_before), perplexity_of(nll_of_base), tokens,
    )  # fmt: skip


def _logits(model: Any, ids: Tensor) -> Tensor:
    """Of every token but the last: ``[tokens, vocabulary]``."""
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
    return logits.cpu()


def _sums(p: Tensor, q: Tensor, base: Tensor, goals: Tensor) -> Tensor:
    total = torch.zeros(5, dtype=torch.float64)
    for rows in range(0, len(goals), _ROWS):
        part = slice(rows, rows + _ROWS)
        log_p, log_q, log_base = (one[part].float().log_softmax(1) for one in (p, q, base))
        probability, goal = log_p.exp(), goals[part, None]
        total[0] += (probability * (log_p - log_q)).sum()
        total[1] += (probability * (log_p - log_base)).sum()
        for i, log in enumerate((log_q, log_p, log_base), 2):
            total[i] -= log.gather(1, goal).sum()
    return total
