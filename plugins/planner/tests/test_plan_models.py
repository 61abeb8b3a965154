"""Plans count what the core does: experts, a file of a whole model, the loss's weights."""

import pytest
from modulora_planner.fitting import plan
from modulora_planner.model import PlannedModel, open_planned
from modulora_planner.rehearsal import rehearse_training
from modulora_planner.request import PlanRequest, finetuning

from modulora_core.cli import main
from modulora_core.hf.load_model import load_model
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_experts_are_counted(pack):
    _, mixture = pack("gpt_oss", "toy")
    counts = {}
    for targets in ("attention", "experts", "all-linear"):
        options = {"seq_len": 32, "batch_size": 2, "targets": targets}
        request = PlanRequest(model=str(mixture), config=finetuning(options))
        _, packed = open_planned(request)
        assert isinstance(packed, PlannedModel)
        counts[targets] = sum(rehearse_training(packed, request).trained)
    assert counts["attention"] + counts["experts"] == counts["all-linear"]
    model = load_model(mixture)
    add_lora(model, LoRASettings(targets="experts"))
    assert counts["experts"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all("experts" in path for path, _ in adapter_layers(model))


def test_a_whole_model_in_a_file_is_planned_as_it_is(pack, toy, tmp_path):
    path = tmp_path / "model.single"
    _, packed = pack("llama", "toy")
    assert main(["merge", str(packed), str(path), "--json"]) == 0
    assert plan(str(path), seq_len=16, device="cpu").quantizer == "toy"
