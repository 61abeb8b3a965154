"""The plan of one process of a distributed run."""

import pytest
from modulora_planner.fitting import plan
from modulora_planner.processes import DIVIDED
from transformers import LlamaConfig

pytestmark = pytest.mark.usefixtures("one_thread", "toy")

HIDDEN, BLOCKS, VOCABULARY = 256, 8, 4096


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=BLOCKS, vocab_size=VOCABULARY,
        num_attention_heads=4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_ddp_copies_and_fsdp2_divides(llama):
    options = {"seq_len": 32, "batch_size": 1}
    one = plan(str(llama), "toy", **options)
    copied = plan(str(llama), "toy", processes=4, **options)
    split = plan(str(llama), "toy", processes=4, shard=True, **options)
    items = dict(one.training.items)
    adapter = items["adapter"]
    assert copied.training.items == {**items, "gradients": items["gradients"] + adapter}
    found = dict(split.training.items)
    block = (items["packed_codes"] + items["packed_scales"] + adapter) / BLOCKS
    assert found.pop("gathered") == pytest.approx(2 * block + 4 * VOCABULARY * HIDDEN, rel=1e-3)
    parts = {name: round(items[name] / 4) if name in DIVIDED else items[name] for name in items}
    assert found == parts
    assert split.decoding == one.decoding
