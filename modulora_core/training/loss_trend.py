"""Summarize the losses of a run's steps.

Each loss is of one batch. Batches differ by more than most finetuning changes, so that a difference
of two losses is no trend: we compare means of several steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance


def loss_in_words(losses: Sequence[float], digits: int = 4) -> str:
    """``loss 2.9312 → 2.5077 (means of the first and last 5 steps)``; below 10 steps, one mean."""
    size = _window(len(losses))
    if size is None:
        steps = f" (mean of {len(losses)} steps)" if len(losses) > 1 else ""
        return f"loss {fmean(losses):.{digits}f}{steps}"
    first, last = fmean(losses[:size]), fmean(losses[-size:])
    return f"loss {first:.{digits}f} → {last:.{digits}f} (means of the first and last {size} steps)"


def eval_loss_before(history: Sequence[Mapping[str, float]]) -> float | None:
    """The evaluation loss before the first step in Trainer's ``log_history``; None without one."""
    before = (e["eval_loss"] for e in history if "eval_loss" in e and e["step"] == 0)
    return next(before, None)


def worsening(losses: Sequence[float], eval_loss: float | None, vocabulary: int) -> str:
    """Describe how training made the model worse; "" if nothing shows that it did.

    It did in two cases. The loss reached that of a uniform guess, ln V, from clearly below at
    step 1. Or its mean rose from the first to the last steps by more than batches scatter.

    Args:
        eval_loss: the loss after the last step on evaluation data; preferred if given.
    """
    if len(losses) < 2:  # its only loss precedes its only update
        return ""
    size = _window(len(losses))
    end = fmean(losses[-(size or 1) :])
    last, source = (end, "at the end") if eval_loss is None else (eval_loss, "on evaluation data")
    guessing = _guessing(losses[0], last, source, vocabulary)
    if guessing or size is None:
        return guessing
    begin = fmean(losses[:size])
    deviation = math.sqrt((variance(losses[:size]) + variance(losses[-size:])) / size)
    if end - begin > max(0.1, 4 * deviation):
        return (
            f"the loss rose from {begin:.4f} to {end:.4f} "
            f"(means of the first and last {size} steps)"
        )
    return ""


def divergence(losses: Sequence[float], vocabulary: int) -> str:
    """Describe that the last 5 losses are those of a uniform guess, from step 10 on; or ""."""
    if len(losses) < 10:
        return ""
    return _guessing(losses[0], fmean(losses[-5:]), "in the last 5 steps", vocabulary)


def _guessing(first: float, last: float, source: str, vocabulary: int) -> str:
    uniform = math.log(vocabulary)
    if last <= 0.99 * uniform or last <= first + 0.1 * uniform:
        return ""
    return (
        f"the loss was {first:.4f} at step 1 and is {last:.4f} {source}; a uniform guess among "
        f"{vocabulary} tokens has {uniform:.4f}"
    )


def _window(steps: int) -> int | None:
    """Number of losses to average at either end; None if there are too few."""
    return max(5, steps // 10) if steps >= 10 else None
