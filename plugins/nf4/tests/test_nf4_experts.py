"""An adapter on experts packed by nf4 has the gradients of PEFT on the decoded experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modulora_core.quantization.quantize import quantize
from modulora_core.tests.expert_gradients import worst_gradient
from modulora_core.tests.tiny_models import tiny_config


@pytest.mark.slow
def test_gradients_of_experts(tmp_path: Path) -> None:
    config = tiny_config("mixtral")
    config.hidden_size = config.intermediate_size = 64
    config.head_dim = 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    quantize(str(tmp_path / "model"), tmp_path / "packed", "nf4")
    assert worst_gradient(tmp_path / "packed", tmp_path) < 1e-12
