"""Plans for a checkpoint of another tool: no more than finetuning can do with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modulora_core.errors import OptionError
from modulora_core.planner import helpful
from modulora_core.planner.fitting import plan_all, plan_memory
from modulora_core.planner.request import PlanRequest, finetuning
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.crude_folders import save_crude
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread", "toy")


@pytest.fixture
def foreign(tmp_path: Path) -> str:
    save_crude(tmp_path / "foreign")
    return str(tmp_path / "foreign")


@pytest.mark.parametrize("plan", [plan_memory, plan_all])
def test_mapping_it_is_refused_as_finetuning_refuses_it(plan: object, foreign: str) -> None:
    request = PlanRequest(foreign, config=finetuning({"mapped": True, "seq_len": 32}))
    with pytest.raises(
        OptionError, match="mapped: expected a checkpoint of modulora's own format, got crude"
    ):
        plan(request)  # type: ignore[operator]


def test_mapping_it_is_no_advice(
    foreign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        helpful, "_WORTH", -(2**40)
    )  # what saves nothing in so small a model is told too
    quantize(str(save_tiny_model("llama", tmp_path / "dense")), tmp_path / "ours", "toy")
    told = {}
    for model in (foreign, str(tmp_path / "ours")):
        plan = plan_memory(PlanRequest(model, config=finetuning({"seq_len": 32}), budget=1))
        told[model] = {change.change for change in plan.changes}
    assert told[str(tmp_path / "ours")] - told[foreign] == {"--mapped"}
