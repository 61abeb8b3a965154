"""A recovery learns the dense model's predictions, computed once, whatever the batches are."""

import json
import shutil

import numpy as np
import pytest
import torch
from modulora_recover import predictions as module
from modulora_recover.predictions import Distilled, Predictions
from modulora_recover.recover import recover
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modulora_core.cli import main
from modulora_core.data import load_examples
from modulora_core.errors import OptionError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.models import open_dense
from modulora_core.tests.processes import run_in_processes
from modulora_core.tests.tiny_tokenizer import write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def teacher(dense, tmp_path):
    """A dense model whose predictions differ from the quantized model's by far."""
    folder = tmp_path / "teacher"
    shutil.copytree(dense, folder)
    generator = torch.Generator().manual_seed(0)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor += 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture
def chats(tmp_path):
    """Conversations of different lengths, of which only the answers are trained."""
    rows = (
        {"prompt": "Why? " * (i + 1), "completion": " because it is so" * (7 - i)} for i in range(7)
    )
    return write_jsonl(tmp_path / "chats.jsonl", *rows)


@pytest.fixture
def examples(chats, tunable):
    return load_examples(chats, AutoTokenizer.from_pretrained(tunable), seq_len=96)


def trained_log_p(model, examples, number):
    """log p of all tokens where a label is trained, fp32 ``[n, vocabulary]``, part by part."""
    found = []
    for ids, labels in examples.parts(number):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([[*ids]])).logits[0, :-1].float()
        found.append(logits.log_softmax(1)[torch.tensor([*labels])[1:] != -100])
    return torch.cat(found)


def cross_entropy_of(model, text, tunable):
    examples = load_examples(text, AutoTokenizer.from_pretrained(tunable), seq_len=32)
    losses = []
    for number in range(len(examples)):
        log_p = trained_log_p(model, examples, number)
        losses.append(-log_p.gather(1, torch.tensor(examples[number]["labels"][1:])[:, None]))
    return float(torch.cat(losses).mean())


def divergence_of_classes(t, p):
    """Σ KL(t ‖ p) of rows, where all tokens but t's 64 most likely ones are one class."""
    order = t.argsort(1, descending=True)
    classes = [
        torch.cat([sorted_[:, :64], sorted_[:, 64:].sum(1, keepdim=True)], 1)
        for sorted_ in (t.gather(1, order), p.gather(1, order))
    ]
    return float((classes[0] * (classes[0] / classes[1]).log()).sum())


@pytest.mark.parametrize("joined", [False, True])
def test_rows_are_the_dense_models_own_predictions(dense, examples, tmp_path, monkeypatch, joined):
    """Padding, batches, chunks and other parts of a row change nothing."""
    monkeypatch.setattr(module, "TOP", 5)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 150)
    monkeypatch.setattr(module, "BATCH_TOKENS", 130)
    examples = examples.joined(96) if joined else examples
    predictions = Predictions(open_dense(str(dense)), examples, 100, 0, tmp_path)
    predictions.compute(torch.device("cpu"), lambda *_: None)
    assert (
        predictions.file.stat().st_size == predictions.nbytes == examples.report.trained_tokens * 30
    )
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    dataset = Distilled(predictions)
    assert len(dataset) == len(examples)
    for number in range(len(examples)):
        log_p, tokens = trained_log_p(model, examples, number).topk(5)
        rows = dataset[number]["rows"]
        np.testing.assert_array_equal(rows["token"], tokens)
        np.testing.assert_allclose(rows["log_p"], log_p, rtol=1e-3)  # they are 16-bit floats


def test_a_killed_run_goes_on_from_its_whole_rows(dense, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 1)
    predictions = Predictions(open_dense(str(dense)), examples, 100, 0, tmp_path)
    calls = []
    predictions.compute(torch.device("cpu"), lambda *call: calls.append(call))
    whole, blocks = predictions.file.read_bytes(), calls[-1][2] // len(examples)
    assert [(done, total) for _, done, total in calls] == [
        (i + 1, len(examples) * blocks) for i in range(len(examples) * blocks)
    ]
    kept = predictions.ends[2] * predictions.row.itemsize
    predictions.file.write_bytes(whole[: kept + 100])  # killed in the fourth example
    calls.clear()
    predictions.compute(torch.device("cpu"), lambda *call: calls.append(call))
    assert predictions.file.read_bytes() == whole
    assert calls[-1][2] == (len(examples) - 3) * blocks, "the first three were kept"
    calls.clear()
    predictions.compute(torch.device("cpu"), lambda *call: calls.append(call))
    assert not calls


@pytest.mark.parametrize("options", [
    {"batch_size": 7, "baseline": True}, {"batch_size": 2, "grad_accum": 4},
    {"batch_size": 7, "packing": True},
    {"batch_size": 7, "weight": 0.25},
], ids=["a batch", "accumulated", "packing", "weighted"])  # fmt: skip
def test_the_first_loss_is_the_divergence_of_the_two_models(
    configure, teacher, tunable, chats, examples, options
):
    """A step takes all data, and a new adapter changes nothing."""
    config = configure(data=str(chats), epochs=1, seq_len=96, dropout=0, original=str(teacher),
                       **{"grad_accum": 1, **options})  # fmt: skip
    first = recover(config).losses[0]
    models = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), load_model(tunable)
    divergence, entropy, count = 0.0, 0.0, 0
    for number in range(len(examples)):
        log_t, log_p = (trained_log_p(model, examples, number) for model in models)
        divergence += divergence_of_classes(log_t.exp(), log_p.exp())
        goals = [label for label in examples[number]["labels"][1:] if label != -100]
        entropy -= float(log_p.gather(1, torch.tensor(goals)[:, None]).sum())
        count += len(goals)
    x = config.weight
    assert first == pytest.approx(((1 - x) * entropy + x * divergence) / count, rel=2e-3)


def test_it_brings_the_model_nearer_to_the_dense_one_and_leaves_no_file(
    configure, teacher, tunable, text, tmp_path
):
    """The loss on evaluation data is the cross-entropy alone."""
    result = recover(configure(steps=20, original=str(teacher), eval_data=str(text), baseline=True))
    assert result.losses[-1] < 0.7 * result.losses[0]
    model = load_model(tunable)
    load_adapter(model, tmp_path / "out")
    assert result.eval_loss == pytest.approx(cross_entropy_of(model, text, tunable), rel=1e-5)
    assert not [*(tmp_path / "out" / "checkpoints").glob("predictions-*")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with the predictions of the dense model" in card
    assert "| weight | 1.0 |" in card
    assert str(teacher) not in card


@pytest.mark.parametrize("stopped_at", [0, 3])
def test_a_resumed_run_has_the_same_losses(configure, tmp_path, stopped_at, monkeypatch):
    options = {"weight": 0.5, "steps": 6, "save_every": 2}
    whole = recover(configure(out=str(tmp_path / "whole"), **options))

    def stop(*_):
        raise KeyboardInterrupt

    def at_step(step):
        if step.step == stopped_at:
            stop()

    if stopped_at == 0:
        monkeypatch.setattr(Predictions, "_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        recover(configure(**options), on_step=at_step)
    monkeypatch.undo()
    resumed = recover(configure(**options), resume=True)
    assert resumed.losses == whole.losses


def test_another_tokenizer_or_context_is_refused_before_work_starts(configure, dense, tmp_path):
    for name, change in (("vocab_size", 2), ("max_position_embeddings", -100)):
        other = tmp_path / name
        shutil.copytree(dense, other)
        config = json.loads((other / "config.json").read_text())
        if name == "vocab_size":
            tokens = json.loads((other / "tokenizer.json").read_text())
            vocabulary = tokens["model"]["vocab"]
            first, second = [*vocabulary][-2:]
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            (other / "tokenizer.json").write_text(json.dumps(tokens))
        else:
            config[name] += change
        (other / "config.json").write_text(json.dumps(config))
        expected = "tokenizer of the quantized" if name == "vocab_size" else "context of seq_len"
        with pytest.raises(OptionError, match=f"^original .*{expected}"):
            recover(configure(original=str(other)))
        assert not (tmp_path / "out").exists()


def test_the_command_gives_a_start_that_finetune_continues(tunable, dense, text, tmp_path, capsys):
    def run(*words):
        more = ("--data", str(text), "--seq-len", "32", "--steps", "2", "--json")
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    start = str(tmp_path / "start")
    found = run("recover", str(tunable), start, "--original", str(dense))
    assert len(found["losses"]) == 2
    assert run("recover", str(tunable), start, "--original", str(dense), "--resume")["steps"] == 0
    trained = run("finetune", str(tunable), str(tmp_path / "out"), "--adapter", start)
    assert len(trained["losses"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_processes_learn_from_one_dense_model(configure, tmp_path, shard):
    """The first process computes the predictions; each reads the rows of its examples."""
    expected = recover(configure(dropout=0.0, weight=0.8)).losses
    of_two = {"dropout": 0.0, "weight": 0.8, "grad_accum": 1, "shard": shard}
    config = configure(**of_two, out=str(tmp_path / "two"))
    for found in run_in_processes(2, recover, config):
        assert found.losses == pytest.approx(expected, abs=1e-4)
    assert not [*(tmp_path / "two" / "checkpoints").glob("predictions-*")]
