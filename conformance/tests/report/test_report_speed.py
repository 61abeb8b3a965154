from __future__ import annotations

import json
from typing import Any

import torch
from modulora_conformance import speed
from modulora_conformance.report import write_report
from modulora_conformance.report.reading import Speed
from torch import Tensor

from modulora_core.spec import Calibration, PackedWeight, Quantizer, QuantizerSpec


class Plain(Quantizer):
    """Keeps the float32 weight."""

    spec = QuantizerSpec(
        name="plain", summary="float32", location="nowhere:Plain", protocol=1, bits=(32,)
    )

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        return PackedWeight(
            "plain",
            1,
            (weight.shape[0], weight.shape[1]),
            {"values": weight.float().contiguous().clone()},
        )

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return packed.tensors["values"][slice(*rows)].to(dtype, copy=True)


class Failing(Plain):
    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        raise ZeroDivisionError


def test_speed_is_told_for_a_tile_and_for_few_and_many_rows_both_ways(
    monkeypatch: Any, make: Any, tmp_path: Any
) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    measured = json.loads(json.dumps(speed.measure_speed(Plain())))
    found = Speed.model_validate(measured)
    assert len(found.timings) == 5
    assert found.shape == speed.SHAPE
    assert found.timings[0].bytes == 4 * speed.SHAPE[0] * speed.SHAPE[1]
    write_report(make(speed={"defaults": measured}), tmp_path)
    text = (tmp_path / "mine.html").read_text("utf-8")
    assert all(timing.name in text for timing in found.timings)


def test_a_quantizer_that_fails_has_no_speed_and_no_section(make: Any, tmp_path: Any) -> None:
    assert speed.measure_speed(Failing()) == {}
    write_report(make(speed={}), tmp_path)
    assert 'id="speed"' not in (tmp_path / "mine.html").read_text("utf-8")
