"""Products that gradient checkpointing keeps, in a plan."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from transformers import LlamaConfig

from modulora_core.planner.fitting import plan_memory
from modulora_core.planner.request import PlanRequest, finetuning

HIDDEN, KEYS, INTERMEDIATE, BLOCKS, TOKENS = 1024, 512, 2816, 8, 512


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=BLOCKS, num_attention_heads=8, num_key_value_heads=4,
                vocab_size=8192).save_pretrained(folder)  # fmt: skip
    return folder


def request(llama: Path, budget: int | None = None, **options: object) -> PlanRequest:
    config = finetuning({"batch_size": 1, "seq_len": TOKENS, **options})
    return PlanRequest(str(llama), "toy", config=config, budget=budget)


def test_they_are_planned_by_their_bytes(toy: ModuleType, llama: Path) -> None:
    def activations(**options: object) -> int:
        return int(plan_memory(request(llama, **options)).training.items["activations"])

    # the first step keeps the last of a block too
    products = TOKENS * BLOCKS * (3 * HIDDEN + 2 * KEYS + 2 * INTERMEDIATE)
    none, rounded, exact = (
        activations(keep_products=form) for form in ("none", "rounded", "exact")
    )
    assert exact - none == pytest.approx(4 * products, rel=0.1)
    assert rounded - none == pytest.approx(products * (1 + 4 / 128), rel=0.1)
    assert activations(keep_products="exact", offload_activations=True) < none


def test_without_room_a_plan_says_what_less_of_them_saves(toy: ModuleType, llama: Path) -> None:
    found = plan_memory(request(llama, budget=2**20, keep_products="exact"))
    saved = {change.change: change.saves for change in found.changes}
    assert 0 < saved["--keep-products rounded"] < saved["--keep-products none"]
