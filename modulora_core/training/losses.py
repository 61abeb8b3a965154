"""What the losses of a run's steps say, and what they don't.

Each is of its step's batch, and batches differ in difficulty by more than most finetuning changes: two of them aren't a trend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance


def loss_in_words(losses: Sequence[float], digits: int = 4) -> str:
    """``loss 2.9312 → 2.5077 (means of the first and last 5 steps)``; of few steps one mean, of all."""
    size = _window(len(losses))
    if size is None:
        of = f" (mean of {len(losses)} steps)" if len(losses) > 1 else ""
        return f"loss {fmean(losses):.{digits}f}{of}"
    first, last = fmean(losses[:size]), fmean(losses[-size:])
    return f"loss {first:.{digits}f} → {last:.{digits}f} (means of the first and last {size} steps)"


def divergence(losses: Sequence[float], eval_loss: float | None, vocabulary: int) -> str:
    """In words how training made the model worse; "" if nothing says that it did.

    It did where the loss became that of a uniform guess, ln V, and was clearly less at step 1, before the first change; or where
    its mean rose from the first steps to the last by more than the differences of their batches explain.

    Args:
        losses: of every step.
        eval_loss: after the last step, if it was measured. It is asked before the steps' own.
        vocabulary: V.
    """
    if len(losses) < 2:  # the only one was there before the only change
        return ""
    size = _window(len(losses))
    end = fmean(losses[-(size or 1) :])
    uniform = math.log(vocabulary)
    last, where = (
        (end, "at the end") if eval_loss is None else (eval_loss, "on the evaluation data")
    )
    if last > 0.99 * uniform and last > losses[0] + 0.1 * uniform:
        return (f"the loss was {losses[0]:.4f} at step 1 and is {last:.4f} {where}, where a guess that takes all {vocabulary} "
                f"tokens for equally likely has {uniform:.4f}")  # fmt: skip
    if size is None:
        return ""
    begin = fmean(losses[:size])
    scatter = math.sqrt(
        (variance(losses[:size]) + variance(losses[-size:])) / size
    )  # of end - begin
    if end - begin > max(0.1, 4 * scatter):
        return f"the loss rose from {begin:.4f} to {end:.4f} (means of the first and last {size} steps)"
    return ""


def _window(steps: int) -> int | None:
    """How many losses at either end are compared; None: there are too few."""
    return max(5, steps // 10) if steps >= 10 else None
