"""Plans add up, need a config alone, answer a budget, and are of one process of several."""

import shutil

import pytest
from modulora_planner.fitting import CLOSE, plan
from modulora_planner.memory import ITEMS
from modulora_planner.processes import DIVIDED
from transformers import LlamaConfig

from modulora_core.checkpoints.opening import open_packed

pytestmark = pytest.mark.usefixtures("one_thread", "toy")

HIDDEN, KEYS, INTERMEDIATE, BLOCKS, VOCABULARY = 1024, 512, 2816, 8, 8192
SAVED = {"gradient_checkpointing": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with the config of a Llama of 100 million weights, and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=BLOCKS,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=VOCABULARY,
    ).save_pretrained(folder)  # fmt: skip
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return str(folder)


def planned(model, quantizer="toy", **options):
    return plan(str(model), quantizer, **{"batch_size": 2, "seq_len": 256, **options})


def test_items_add_up_and_dense_weights_are_the_models(llama):
    found = planned(llama)
    items = found.training.items
    assert items["packed_codes"] + items["packed_scales"] == found.packed_bytes
    assert items["embeddings_and_head"] == 2 * 4 * VOCABULARY * HIDDEN
    assert items["norms_and_biases"] == 4 * (2 * BLOCKS + 1) * HIDDEN
    per_layer = 4 * HIDDEN + 2 * (HIDDEN + KEYS) + 3 * (HIDDEN + INTERMEDIATE)
    assert items["adapter"] == 4 * BLOCKS * 8 * per_layer
    assert set(found.jobs) == {"training", "decoding", "quantizing"}
    for job in found.jobs.values():
        assert sum(job.items.values()) == job.nbytes
        assert set(job.items) <= set(ITEMS)


def test_a_checkpoint_has_the_plan_of_its_model(pack, tmp_path):
    dense, packed = pack("llama-tied", "toy")
    shutil.copy(packed / "config.json", tmp_path)  # without its weights
    before, after = planned(dense, seq_len=64), planned(tmp_path, None, seq_len=64)
    assert (after.training, after.decoding) == (before.training, before.decoding)
    assert (after.quantizing, after.quantizer) == (None, "toy")
    assert after.packed_bytes == open_packed(str(packed)).record.nbytes


@pytest.mark.parametrize(
    ("optim", "device", "nbytes"),
    [
        ("adamw_torch_fused", "cpu", 8),
        ("adamw_bnb_8bit", "cuda", 2 * (1 + 4 / 256)),
        ("paged_adamw_32bit", "cuda", 0),
        ("lion_32bit", "cuda", 4),
        ("adafactor", "cpu", 0),
    ],
)
def test_an_optimizer_has_the_states_of_its_name(optim, device, nbytes, llama):
    items = planned(llama, optim=optim, device=device).training.items
    assert items.get("optimizer", 0) == pytest.approx(nbytes / 4 * items["adapter"], rel=1e-6)


def test_a_mapped_model_has_one_block_in_memory(llama):
    resident, mapped = (planned(llama, mapped=mapped) for mapped in (False, True))
    assert mapped.packed_bytes == resident.packed_bytes, "of the whole model"
    packed = {"packed_codes", "packed_scales"}
    assert sum(mapped.training.items[item] for item in packed) == resident.packed_bytes / BLOCKS
    for before, after in zip(resident.jobs.values(), mapped.jobs.values(), strict=True):
        rest = [{k: v for k, v in job.items.items() if k not in packed} for job in (before, after)]
        assert rest[0] == rest[1]


def test_a_budget_finds_the_longest_sequence_and_the_largest_batch(llama):
    found = planned(llama, **SAVED, budget=planned(llama, **SAVED).training.nbytes)
    assert (found.fits, found.changes, found.largest_batch_size) == (True, (), 2)
    assert found.longest_seq_len is not None
    assert 256 <= found.longest_seq_len <= 256 * (1 + CLOSE) + 1


@pytest.mark.parametrize(("device", "width"), [("cpu", 4), ("cuda", 2)])
def test_without_a_quantizer_the_weights_are_dense_and_nothing_is_packed(llama, device, width):
    found = planned(llama, "none", device=device)
    per_block = 2 * HIDDEN * (HIDDEN + KEYS) + 3 * HIDDEN * INTERMEDIATE
    assert found.training.items["dense_weights"] == width * BLOCKS * per_block
    assert not {"packed_codes", "packed_scales"} & found.training.items.keys()
    assert set(found.jobs) == {"training", "decoding"}
    assert found.bits_per_weight == 8 * width
    packed = planned(llama, device=device)
    assert found.training.nbytes - packed.training.nbytes == pytest.approx(
        found.packed_bytes - packed.packed_bytes, rel=0.01
    )


def test_ddp_copies_and_fsdp2_divides(llama):
    one, copied, split = (
        planned(llama, batch_size=1, seq_len=32, **of_four)
        for of_four in ({}, {"processes": 4}, {"processes": 4, "shard": True})
    )
    items = dict(one.training.items)
    adapter = items["adapter"]
    assert copied.training.items == {**items, "gradients": items["gradients"] + adapter}
    found = dict(split.training.items)
    block = (items["packed_codes"] + items["packed_scales"] + adapter) / BLOCKS
    assert found.pop("gathered") == pytest.approx(2 * block + 4 * VOCABULARY * HIDDEN, rel=1e-3)
    parts = {name: round(items[name] / 4) if name in DIVIDED else items[name] for name in items}
    assert found == parts
    assert split.decoding == one.decoding
