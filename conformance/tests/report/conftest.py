"""Results of runs that never took place, made of the kit's own values: what reports are written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from modulora_conformance.measurements import Measurement
from modulora_conformance.results import HARDWARE, Outcome, Result

CONFIGURATIONS = ("defaults", "bits=2, group_size=64")

HOSTILE = "<script src='https://example.org/x.js'>alert(1)</script>\" onload=\"x | `y` & \n**z**"
"""What a plugin might say in a reason, a name or its options."""

Make = Callable[..., dict[str, Any]]


def outcome(
    level: str, check: str, kind: Any = "passed", configuration: str = "defaults", **more: Any
) -> Outcome:
    """One outcome; ``measured`` is of ``(name, value, limit, unit)``."""
    measured = tuple(Measurement(*values).to_json() for values in more.pop("measured", ()))
    return Outcome(
        level,
        f"test_{check}",
        more.pop("case", ""),
        configuration,
        kind,
        more.pop("reason", ""),
        0.0123,
        measured,
    )


def passing(configuration: str) -> list[Outcome]:
    """A run of all levels that a certificate may be given for."""
    bits, error, share = (
        ("bits per weight", 4.5, 4.5, "bits"),
        ("error of gaussian weights", 0.0953, 0.1, "relative"),
        2e-6,
    )
    return [
        outcome("L0", "the_protocol_is_supported", configuration=configuration),
        outcome("L1", "bits_per_weight_keep_the_promise", configuration=configuration, measured=[bits]),
        outcome("L1", "the_error_keeps_the_promise", configuration=configuration, case="gaussian", measured=[error]),
        *(outcome("L2", "every_dtype_is_the_float32_tile_rounded", configuration=configuration, case=dtype,
                  measured=[(f"tile in {dtype}", value, 2**-10, "relative")])
          for dtype, value in (("float32", 0.0), ("float16", 4e-4), ("bfloat16", 9e-4))),
        *(outcome("L3", "the_product_equals_the_dense_one", configuration=configuration, case=dtype,
                  measured=[("product", value, share, "relative")])
          for dtype, value in (("float64", 3e-11), ("float32", 4e-7))),
        outcome("L4", "gradients_equal_those_of_the_dense_layer", configuration=configuration,
                measured=[("dX", 3e-6, 1e-5, "relative"), ("dA", 8e-6, 1e-5, "relative")]),
        outcome("L5", "the_peak_is_that_of_a_tile", configuration=configuration,
                measured=[("peak of forward", 1.2e6, 2**21, "bytes"), ("growth over 50 steps", 0.0, 4096.0, "bytes")]),
        outcome("L6", "a_checkpoint_round_trips", configuration=configuration),
        outcome("L7", "torch_compile_gives_the_same", configuration=configuration),
        outcome("L7", "cuda_gives_the_same", "skipped", configuration, reason=f"{HARDWARE}no CUDA device"),
    ]  # fmt: skip


def speed() -> dict[str, Any]:
    timings = [
        {"name": "decode, beside a copy", "seconds": 1e-4, "dense_seconds": 5e-5, "bytes": 2**21},
        {"name": "x Ŵᵀ, 1 row", "seconds": 2e-5, "dense_seconds": 6e-5, "bytes": 0},
    ]
    return {"shape": [1024, 512], "threads": 2, "timings": timings}


@pytest.fixture
def make() -> Make:
    """``make(outcomes)`` gives the JSON of a run, as a reader of the file gets it; by default of one that is certified."""

    def made(
        outcomes: list[Outcome] | None = None, quantizer: str = "mine", **fields: Any
    ) -> dict[str, Any]:
        if outcomes is None:
            outcomes = [found for name in CONFIGURATIONS for found in passing(name)]
        known: dict[str, Any] = {
            "quantizer": quantizer, "protocol": 1, "distribution": f"modulora-{quantizer}", "version": "1.0", "complete": True,
            "asked": True,
            "seed": "1234", "environment": {"python": "3.11.9", "accelerators": [], "packages": {"torch": "2.9", "numba": None}},
            "about": {level: {"title": f"title of {level}", "text": f"About {level}."} for level in {o.level for o in outcomes}},
            "meanings": {o.check: f"If this fails: look at `{o.check}`." for o in outcomes}, "speed": {"defaults": speed()},
        }  # fmt: skip
        result = Result(outcomes=tuple(outcomes), **(known | fields)).to_json()
        loaded: dict[str, Any] = json.loads(json.dumps(result))
        return loaded

    return made


@pytest.fixture
def broken(make: Make) -> dict[str, Any]:
    """The JSON of a run with every outcome in it, and with words that try to be markup."""
    second = CONFIGURATIONS[1]
    outcomes = [*passing("defaults"), *passing(second)]
    outcomes += [
        outcome("L3", "the_two_directions_are_adjoint", "failed", second, case="float32", reason=f"error 3e-2: {HOSTILE}",
                measured=[("difference of the directions", 0.03, 2e-6, "relative"), ("other", float("inf"), 1.0, "relative")]),
        outcome("L5", "nothing_dense_is_kept", "failed", second, reason="kept 8 MiB",
                measured=[(f"kept {HOSTILE}", 8e6, 2e6, "bytes")]),
        outcome("L4", "a_check_that_rests_on_it", "blocked", second, reason="test_the_two_directions_are_adjoint failed before"),
        outcome("L6", "an_older_format_is_read", "xfailed", HOSTILE, reason="not yet"),
        outcome("L6", "something_else", "skipped", second, reason="I didn't feel like it"),
    ]  # fmt: skip
    return make(
        outcomes,
        distribution=HOSTILE,
        environment={HOSTILE: [HOSTILE], "packages": {"torch": HOSTILE}},
    )
