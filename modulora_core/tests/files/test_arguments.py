"""Arguments of other types are refused by name, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modulora_core
from modulora_core.errors import RequestError
from modulora_core.files.arguments import check_type
from modulora_core.quantization.layout import Selection

api: Any = modulora_core

WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "path": (lambda _: api.load_model(5), "model 5"),
    "null byte": (lambda _: api.load_model("a\0b"), "null"),
    "out": (lambda _: api.quantize("m", None, "toy"), "output folder 'None'"),
    "model": (lambda _: api.evaluate(5), "model: expected a name"),
    "seed": (lambda out: api.quantize("m", out, "toy", seed="x"), "seed: expected int"),
    "include": (
        lambda _: Selection("q_proj"),
        "include: expected a list of patterns, got 'q_proj'",
    ),
    "nan": (lambda _: api.Sampling(temperature=float("nan")), "temperature: expected 0"),
    "bool": (lambda _: api.Sampling(top_k=True), "top_k: expected int, got True"),
    "rank": (lambda _: api.LoRASettings(rank=None), "rank: expected int, got None"),
    "samples": (lambda _: api.CalibrationConfig("x", 1.5), "samples: expected int or"),
    "quantizer": (lambda _: api.Choice(5).create(), "quantizer 5 isn't installed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_of_another_type_is_refused(case: str, tmp_path: Path) -> None:
    call, message = WRONG[case]
    with pytest.raises(RequestError) as found:
        call(tmp_path / "out")
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_numbers_of_numpy_are_numbers() -> None:
    check_type("seed", np.int64(3), "int")
    check_type("lr", np.float32(3), "float | None")
    check_type("lr", 3, "float")
    assert api.Sampling(temperature=np.float64(0.5)).temperature == 0.5
