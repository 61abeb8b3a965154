"""How fast a quantizer is beside a dense float32 layer, on this machine: for a report to show. No check depends on it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from modulora_conformance.bench.timing import Call, in_turns
from modulora_conformance.cases import fit, gaussian, inputs, pack
from modulora_core.spec import Quantizer

SHAPE = (1024, 512)
"""2 MiB in float32, which caches may hold. Short rows: the time that calibrated quantizers take to pack grows with their square."""

FEW, MANY = 1, 512
"""Rows of an input: a token being generated; a batch being trained on."""

SECONDS = 0.3
"""For each comparison, both sides together."""

MOST_TURNS = 200


def measure_speed(quantizer: Quantizer) -> dict[str, Any]:
    """Decode a tile beside a copy of it, and multiply both ways by few and many rows beside a dense float32 weight, in turns
    (:func:`modulora_conformance.bench.timing.in_turns`). ``modulora bench`` measures more, and weights that no cache holds.

    Returns:
        JSON-able, for :class:`modulora_conformance.report.reading.Speed`; empty where the quantizer fails, which checks tell.
    """
    try:
        return _measured(quantizer)
    except Exception:  # a plugin may raise anything
        return {}


def _measured(quantizer: Quantizer) -> dict[str, Any]:
    weight = gaussian(fit(quantizer, *SHAPE), 0)
    packed = pack(quantizer, weight)
    out_features, in_features = weight.shape
    tile = partial(quantizer.dequantize_tile, packed, (0, out_features), torch.float32)
    pairs: list[tuple[str, int, Call, Call]] = [
        (
            "decode, beside a copy",
            weight.nbytes,
            tile,
            partial(torch.empty_like(weight).copy_, weight),
        )
    ]
    for rows in (FEW, MANY):
        x, y = (
            inputs((rows,), in_features, torch.float32),
            inputs((rows,), out_features, torch.float32),
        )
        size = f"{rows} row" if rows == 1 else f"{rows} rows"
        pairs += [
            (
                f"x Ŵᵀ, {size}",
                0,
                partial(quantizer.matmul, x, packed),
                partial(torch.matmul, x, weight.T),
            ),
            (
                f"y Ŵ, {size}",
                0,
                partial(quantizer.matmul, y, packed, True),
                partial(torch.matmul, y, weight),
            ),
        ]
    with torch.no_grad():
        timings = [
            {"name": name, "bytes": nbytes} | _alternating(ours, dense)
            for name, nbytes, ours, dense in pairs
        ]
    return {"shape": list(weight.shape), "threads": torch.get_num_threads(), "timings": timings}


def _alternating(ours: Call, dense: Call) -> dict[str, float]:
    """The median seconds of each and the worse noise of the two, for :class:`modulora_conformance.report.reading.Timing`."""
    timings = in_turns({"ours": ours, "dense": dense}, seconds=SECONDS, most=MOST_TURNS)
    return {
        "seconds": timings["ours"].seconds,
        "dense_seconds": timings["dense"].seconds,
        "noise": max(timing.noise for timing in timings.values()),
    }
