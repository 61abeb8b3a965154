"""Samples that are held out of calibration have weighted second moments of their own, and take no part in the others'."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from modulora_core.calibration import (
    BlockWalk,
    CalibrationConfig,
    CalibrationText,
    HeldOutCalibration,
)
from modulora_core.models import open_model
from modulora_core.models.sites import find_sites
from modulora_core.spec import Calibration
from modulora_core.tests.products import second_moments
from modulora_core.tests.tiny_models import save_tiny_model

IDS = torch.randint(3, 96, (7, 24), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.usefixtures("one_thread")


class Seen:
    """Packs nothing, and leaves every weight as it is."""

    def __init__(self) -> None:
        self.calibrations: dict[tuple[str, int], Calibration | None] = {}

    def keep(self, name: str, tensor: Tensor) -> None:
        pass

    def wants_calibration(self, name: str) -> bool:
        return True

    def is_packed(self, name: str) -> bool:
        return False

    def restore(self, name: str) -> None:
        raise AssertionError(name)

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> None:
        self.calibrations |= {(name, i): calibration for i, calibration in enumerate(calibrations)}


@pytest.mark.parametrize("paused_bytes", [0, 2**30])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_each_kind_of_sample_has_its_own_second_moment(
    architecture: str, paused_bytes: int, tmp_path: Path
) -> None:
    folder, seen = save_tiny_model(architecture, tmp_path), Seen()
    source = open_model(str(folder))
    linears = find_sites(source.skeleton()).linears
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    calibrating, held_out = (
        second_moments(model, IDS[:5]),
        [second_moments(model, ids[None]) for ids in IDS[5:]],
    )
    generator = torch.Generator().manual_seed(2)
    weights = {
        linear.name: [
            [
                torch.rand(sum(map(len, sample.inputs[linear.name, i])), generator=generator)
                for sample in held_out
            ]
            for i in range(linear.experts or 1)
        ]
        for linear in linears
    }
    config = CalibrationConfig(
        "ids", batch_size=4
    )  # batches don't end where the held out samples begin
    walk = BlockWalk(
        source, CalibrationText(config, IDS), linears, device=torch.device("cpu"), folder=folder, paused_bytes=paused_bytes,
        held_out=weights,
    )  # fmt: skip
    walk.run(seen)
    for (name, i), found in seen.calibrations.items():
        assert isinstance(found, HeldOutCalibration)
        assert found.samples == sum(map(len, calibrating.inputs[name, i]))
        if found.samples:
            assert error(found.hessian, calibrating.hessian(name, i)) < 1e-5, (name, i)
        inputs = [x for sample in held_out for x in sample.inputs[name, i]]
        assert found.held_out.samples == sum(map(len, inputs))
        if inputs:
            x, w = torch.cat(inputs), torch.cat(weights[name][i]).double()
            assert error(found.held_out.hessian, (x * w[:, None]).t() @ x / len(x)) < 1e-5, (
                name,
                i,
            )
    assert any(i for _, i in seen.calibrations) == (architecture == "mixtral")


def error(found: Tensor, expected: Tensor) -> float:
    """Relative; sums of hundreds of fp32 products are within 1e-5 of fp64."""
    return float((found.double() - expected).norm() / expected.norm())
