"""Batches of examples of similar length: every example once, and little padding."""

import random
from array import array

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from modulora_core.data import Collator, load_examples
from modulora_core.data.examples import DataReport, Examples
from modulora_core.errors import OptionError
from modulora_core.tests.tiny_models import save_tiny_model
from modulora_core.tests.tiny_tokenizer import make_tokenizer, write_jsonl
from modulora_core.training.batches import SimilarLengths, check_joined
from modulora_core.training.chunked_loss import token_losses
from modulora_core.training.finetune import finetune


def chat_lengths(count):
    """Lengths of chats: about 180 tokens in the mean, and 5 % above 1,000."""
    draw = random.Random(0)
    return [
        draw.randint(1001, 1400) if draw.random() < 0.05 else int(draw.lognormvariate(4.6, 0.6))
        for _ in range(count)
    ]


def padding(lengths, order, batch_size):
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    positions = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / positions


@pytest.mark.parametrize("count", [0, 1, 5, 999, 1024])
@pytest.mark.parametrize("step_size", [1, 4, 32, 300])
def test_an_epoch_has_each_example_once_in_an_order_of_its_own(count, step_size):
    sampler = SimilarLengths(chat_lengths(count), step_size, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(count))
    assert len(sampler) == count
    assert list(sampler) == first, "a resumed run takes the same order"
    sampler.set_epoch(1)
    assert count < 9 or list(sampler) != first
    assert count < 9 or list(SimilarLengths(chat_lengths(count), step_size, seed=4)) != first


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_little_of_a_batch_is_padding(batch_size):
    lengths = chat_lengths(2000)
    shuffled = random.Random(1).sample(range(2000), 2000)
    sampler = SimilarLengths(lengths, 8, seed=0)
    assert padding(lengths, list(sampler), batch_size) < 0.12
    assert padding(lengths, shuffled, batch_size) > 0.3


def test_evaluation_batches_have_similar_lengths_and_the_same_loss(
    configure, tmp_path, monkeypatch
):
    rows = ({"prompt": "Is it?", "completion": " no" * count} for count in (1, 12, 2, 11, 3, 10))
    answers = write_jsonl(tmp_path / "answers.jsonl", *rows)
    collate, batches = Collator.__call__, list[list[int]]()

    def seen(collator, examples):
        batches.append([len(example["input_ids"]) for example in examples])
        return collate(collator, examples)

    monkeypatch.setattr(Collator, "__call__", seen)
    common = {"data": str(answers), "eval_data": str(answers), "seq_len": 64, "steps": 1}
    losses = []
    for batch_size in (2, 1):
        config = configure(**common, batch_size=batch_size, grad_accum=2 // batch_size, dropout=0,
                           out=str(tmp_path / f"{batch_size}"))  # fmt: skip
        losses.append(finetune(config).eval_loss)
        if batch_size == 2:
            evaluated = batches[-3:]
    lengths = sorted((length for batch in evaluated for length in batch), reverse=True)
    assert evaluated == [lengths[:2], lengths[2:4], lengths[4:]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_joined_examples_have_the_losses_of_each_example_alone(architecture, attention, tmp_path):
    folder = save_tiny_model(architecture, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    check_joined(model, 2)
    draw = random.Random(2)
    lengths = [draw.randint(2, 20) for _ in range(9)]
    parts = [array("i", (draw.randrange(3, 96) for _ in range(length))) for length in lengths]
    report = DataReport(
        format="chat", records=9, examples=9, tokens=sum(lengths), trained_tokens=0, blank=0
    )
    examples = Examples([(ids, ids) for ids in parts], report)
    joined = examples.joined(24)
    assert sum(joined.lengths) == sum(lengths)
    assert max(joined.lengths) <= 24
    assert len(joined) <= -(-sum(lengths) // 24) + 1

    def losses(batch):
        batch.pop("attention_mask")
        labels = batch.pop("labels")
        with torch.no_grad():
            found = token_losses(model(**batch, use_cache=False).logits, labels)
        return sorted(found[labels[:, 1:] != -100].tolist())

    alone = [loss for i in range(9) for loss in losses(Collator(0)([examples[i]]))]
    rows = Collator(0)([joined[i] for i in range(len(joined))])
    assert losses(rows) == pytest.approx(sorted(alone), rel=1e-5)


def test_a_model_that_mixes_joined_examples_is_refused(tmp_path):
    class Mixing(LlamaForCausalLM):
        def forward(self, *arguments, **given):
            given.pop("position_ids", None)
            return super().forward(*arguments, **given)

    model = Mixing.from_pretrained(save_tiny_model("llama", tmp_path))
    with pytest.raises(OptionError, match="packing: expected a model"):
        check_joined(model, 2)


def test_packing_trains_all_tokens_in_fewer_rows(configure, tmp_path):
    rows = ({"prompt": "Is it?", "completion": " no" * count} for count in (1, 2, 9, 3, 7, 4, 5))
    answers = write_jsonl(tmp_path / "answers.jsonl", *rows)
    common = {"data": str(answers), "seq_len": 32, "grad_accum": 1, "dropout": 0, "steps": 1}
    apart = finetune(configure(**common, batch_size=7))
    joined = load_examples(answers, make_tokenizer(), seq_len=32).joined(32)
    assert len(joined) < 7
    out = str(tmp_path / "joined")
    packed = finetune(configure(**common, batch_size=len(joined), packing=True, out=out))
    assert packed.losses == pytest.approx(apart.losses, rel=1e-5)
