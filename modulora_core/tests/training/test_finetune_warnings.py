"""What a run warns of: it works, but hardly as it was meant."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modulora_core.data.sources import pydoc_text
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

Run = Callable[..., list[str]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tunable: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Run:
    """A short run; it gives the warnings."""
    (tmp_path / "text.txt").write_text(pydoc_text()[:1000])

    def run(**options: Any) -> list[str]:
        defaults = {"model": str(tunable), "out": str(tmp_path / "out"), "data": str(tmp_path / "text.txt"),
                    "batch_size": 2, "grad_accum": 1, "seq_len": 32, "steps": 3}  # fmt: skip
        finetune(FinetuneConfig.build({**defaults, **options}))
        return [
            record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
        ]

    return run


def test_a_usual_run_has_none(run: Run) -> None:
    assert run() == []


def test_a_run_that_diverged_says_that_its_adapter_is_worse(run: Run, tmp_path: Path) -> None:
    (tmp_path / "easy.txt").write_text("the cat and " * 100)
    easy: dict[str, Any] = {"data": str(tmp_path / "easy.txt"), "adapter": str(tmp_path / "good")}
    # random weights know less than a guess does
    assert run(data=easy["data"], out=easy["adapter"], steps=20, lr=3e-2) == []
    # one step of Adam, which is as long as the rate says; behind it attention's gradients are NaN on some processors
    (warning,) = run(**easy, lr=1.0, steps=2, max_grad_norm=0)
    assert warning.startswith(f"{tmp_path / 'out'}: the loss was ")
    assert warning.endswith(": the adapter makes the model worse; lower the learning rate (lr 1)")
    assert (tmp_path / "out" / "adapter_config.json").is_file(), "it is a finished run all the same"


@pytest.mark.parametrize(("warmup", "takes"), [(5, 5), (3, 3), (0.9, 3)])
def test_a_warmup_that_the_run_does_not_outlast_is_told(
    run: Run, warmup: float, takes: int
) -> None:
    (warning,) = run(warmup=warmup)
    assert warning.startswith(
        f"warmup {warmup:g}: it takes {takes} of the run's 3 steps, so the learning rate never reaches"
    )


def test_the_last_step_at_the_peak_is_enough(run: Run) -> None:
    assert run(warmup=2) == []
