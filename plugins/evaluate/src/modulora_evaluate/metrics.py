"""The metrics of ``evaluate``. They import no torch, since the command line's help shows them."""

from __future__ import annotations

from typing import Literal, get_args

Metric = Literal["perplexity", "accuracy", "rouge", "exact-match"]
METRICS: tuple[Metric, ...] = get_args(Metric)
