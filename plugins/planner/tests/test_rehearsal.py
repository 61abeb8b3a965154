"""A rehearsal of a step: blocks of one kind, blocks below the adapter, the cache, refusals."""

import pytest
from modulora_planner import rehearsal
from modulora_planner.model import PlannedModel, open_planned
from modulora_planner.rehearsal import rehearse_decoding, rehearse_training
from modulora_planner.request import PlanRequest, finetuning
from transformers import LlamaConfig

from modulora_core.errors import ModelError
from modulora_core.registry import Choice

pytestmark = pytest.mark.usefixtures("one_thread", "toy")

BATCH, LENGTH = 4, 64
NO_DROPOUT = {"dropout": 0.0}
"""Kernels read a dropout mask. A rehearsal copies up to 1 MiB of it, much beside tiny models."""


def opened(folder, **options):
    run = {"batch_size": BATCH, "seq_len": LENGTH, **NO_DROPOUT, **options}
    request = PlanRequest(model=str(folder), config=finetuning(run))
    _, packed = open_planned(request)
    assert isinstance(packed, PlannedModel)
    return packed, request


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointed"])
def test_one_block_counts_for_all_of_its_kind(checkpointing, tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    LlamaConfig(**sizes, vocab_size=96, num_hidden_layers=6).save_pretrained(tmp_path)
    run = {"batch_size": BATCH, "seq_len": LENGTH, "gradient_checkpointing": checkpointing}
    request = PlanRequest(model=str(tmp_path), config=finetuning(run))
    _, dense = open_planned(request)

    def peaks():
        packed = dense.packed_by(Choice("toy"))
        rehearsals = [rehearse_training(packed, request), rehearse_decoding(packed, request)]
        assert {len(each.kinds) for each in rehearsals} == {6}
        return [each.peak()[1].total() for each in rehearsals]

    one = peaks()
    monkeypatch.setattr(rehearsal, "_kind", id)  # each block is of a kind of its own
    assert one == pytest.approx(peaks(), rel=0.02)


def test_blocks_below_the_adapter_save_nothing(pack):
    _, folder = pack("llama", "toy")
    run = {"gradient_checkpointing": False}
    last = rehearse_training(*opened(folder, **run, targets="model.layers.1.mlp.down_proj"))
    every = rehearse_training(*opened(folder, **run, targets="down_proj"))
    assert (last.kinds, every.kinds) == ((0, 1), (0, 0))
    assert (
        last.segments["forward 0"].change.total() < every.segments["forward 0"].change.total() / 2
    )


def test_the_cache_of_a_prompt_is_the_models(pack):
    _, folder = pack("llama", "verbatim")
    packed, request = opened(folder)
    config = packed.dense.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    fp32_values = 2 * config.num_hidden_layers * LENGTH * width
    assert rehearse_decoding(packed, request).cache == 4 * fp32_values


def test_a_model_that_needs_numbers_is_refused(pack, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        return x[: x.argmax().item()].view(3, 5, 7)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    _, folder = pack("llama", "toy")
    with pytest.raises(ModelError, match="LlamaForCausalLM can't run without its weights"):
        rehearse_training(*opened(folder))
