"""report.html: its curves, its samples, and what it needs from outside."""

import re
from pathlib import Path

import pytest
from modulora_compare import ReportCallback
from modulora_compare.report.page import LONGEST
from modulora_compare.report.samples import answers, question
from transformers import Trainer, TrainingArguments

from modulora_core.checkpoints.opening import open_packed
from modulora_core.data import load_examples
from modulora_core.hf.load_model import load_model
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.models.generation import Sampling, continuations
from modulora_core.tests.adapted_models import trained
from modulora_core.tests.tiny_tokenizer import make_tokenizer, write_jsonl
from modulora_core.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")

OUTSIDE = re.compile(r"<script|<link|<img|@import|url\(|https?://|\son\w+=", re.IGNORECASE)


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"say <b>{word}</b>", "completion": f" {word}"} for word in "abcdefg"]
    return write_jsonl(tmp_path / "data.jsonl", *rows)


def written(run, *words):
    """The page that `modulora report` writes."""
    code, found, _ = run("report", *words)
    assert code == 0, found
    return Path(found["page"]).read_text("utf-8")


def test_a_page_needs_nothing_else(run, configure, data, tmp_path):
    out = tmp_path / "out"
    result = finetune(configure(data=str(data), eval_data=str(data), seq_len=96, baseline=True))
    page = written(run, out)
    assert OUTSIDE.search(page) is None
    assert "default-src 'none'" in page
    assert page.count("<svg ") == 5
    assert "prefers-color-scheme: dark" in page
    assert f"{result.eval_loss_before:.3f} → {result.eval_loss:.3f}" in page
    assert "<span>lr</span><code>0.01</code>" in page
    assert "Sample answers" not in page
    assert f"modulora chat {result.model} --adapter {out}" in page
    page = written(run, out, "--samples", "--device", "cpu", "--out", tmp_path / "other.html")
    assert page.count("say &lt;b&gt;") == 5
    assert "<b>a</b>" not in page
    assert (out / "report.html").is_file()
    with (out / "finetune.yaml").open("a") as file:
        file.write("original: dense\n")  # as the runs of a plugin's command have
    assert "<span>original</span><code>dense</code>" in written(run, out)


def test_the_page_says_on_which_examples_the_loss_is(run, configure, data, tmp_path):
    rows = [{"prompt": f"say {i}", "completion": f" {i * i}"} for i in range(400)]
    many = write_jsonl(tmp_path / "rows.jsonl", *rows)
    held_out = finetune(configure(data=str(many), steps=10, baseline=True)).held_out
    assert held_out is not None
    page = written(run, tmp_path / "out")
    assert f"{held_out.before:.3f} → {held_out.after:.3f}" in page
    assert "on 8 examples of the training data that the run did not reach" in page
    whole = tmp_path / "whole"
    finetune(configure(data=str(data), epochs=1, out=str(whole), baseline=True))
    assert "No loss was measured on held-out data." in written(run, whole)


def test_samples_need_data_that_the_config_names(run, configure, tmp_path):
    config = configure(steps=1, data=None)
    finetune(config, data=[{"text": "The with statement. " * 9}])
    code, found, _ = run("report", tmp_path / "out", "--samples")
    assert code == 2
    assert "records from Python" in found["error"]["message"]
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_callback_writes_the_page_of_any_trainer(tunable, text, tmp_path):
    model = load_model(tunable)
    add_lora(model, LoRASettings(rank=2))
    ids = open_packed(tunable).tokenizer()(text.read_text())["input_ids"]
    rows = [{"input_ids": ids[i : i + 16], "labels": ids[i : i + 16]} for i in range(0, 160, 16)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, logging_steps=1, learning_rate=0.02, report_to="none",
        per_device_train_batch_size=2, save_strategy="no", use_cpu=True, disable_tqdm=True,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.add_callback(ReportCallback)
    trainer.train()
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert OUTSIDE.search(page) is None
    assert "<span>learning_rate</span><code>0.02</code>" in page
    assert page.count("<svg ") == 3, "loss, learning rate, gradient norm"
    assert "<b>4</b>" in page
    assert "modulora chat" not in page


def test_samples_are_greedy_answers_without_and_with_the_adapter(tunable, text):
    base = load_model(tunable)
    adapted = trained(load_model(tunable))
    tokenizer = open_packed(tunable).tokenizer()
    examples = load_examples(text, tokenizer, seq_len=64)
    calls = []
    samples = answers(adapted, tokenizer, examples, lambda *call: calls.append(call))
    assert len(samples) == 5
    assert calls
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] <= calls[-1][2] == 2 * LONGEST
    greedy = Sampling(LONGEST)

    def words(ids):
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    for number, sample in enumerate(samples):
        ids = examples[number * len(examples) // 5]["input_ids"]
        assert (sample.prompt, sample.expected) == (words(ids[:32]), words(ids[32:]))
        for model, answer in ((base, sample.before), (adapted, sample.after)):
            (alone,) = continuations(model, tokenizer, [ids[:32]], greedy)
            assert answer == words(alone)
    assert any(sample.before != sample.after for sample in samples)


CHATML = "<s>system\nBe brief.</s>\n<s>user\nWhat is\nit?</s>\n<s>assistant\n"
HEADERS = "<s>system<s>\n\nBe brief.</s><s>user<s>\n\nWhat is\nit?</s><s>assistant<s>\n\n"


@pytest.mark.parametrize("text", [CHATML, HEADERS], ids=["ChatML", "headers"])
def test_the_prompt_of_a_chat_is_shown_without_the_words_of_its_template(text):
    tokenizer = make_tokenizer()
    assert question(tokenizer.encode(text), tokenizer) == "What is\nit?"
    plain = "A user\nsaid so."
    assert question(tokenizer.encode(f"<s>{plain}"), tokenizer) == plain


# curves
