import shlex

import pytest
from modulora_planner import remedies
from transformers import LlamaConfig

from modulora_core import registry
from modulora_core.cli import main

pytestmark = pytest.mark.usefixtures("one_thread", "toy")

KEYS = {
    "model", "quantizer", "options", "device", "processes", "bits_per_weight", "packed_bytes",
    "training_bytes", "items", "budget_bytes", "fits", "jobs", "longest_seq_len",
    "largest_batch_size", "changes", "together",
}  # fmt: skip


def test_plan_prints_an_object(run, source, monkeypatch):
    monkeypatch.setattr(remedies, "WORTH", 0)  # for a model this small
    code, plan, _ = run("plan", source, "-q", "toy", "--seq-len", 32, "--budget", "1KiB")
    assert code == 0
    assert set(plan) == KEYS
    assert sum(plan["items"].values()) == plan["training_bytes"]
    assert set(plan["jobs"]) == {"training", "decoding", "quantizing"}
    assert set(plan["jobs"]["training"]) == {"bytes", "when", "items"}
    assert plan["fits"] is False
    assert {"change", "training_bytes", "saves", "fits"} == set(plan["changes"][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        "-q toy -o levels=63 --device cuda --rank 64",
        "-q toy --rank 64 --targets q_proj,k_proj --padded --processes 2 --shard --dtype bfloat16 "
        "--quantize-head verbatim --samples 8 --no-gradient-checkpointing --trainer tf32=false",
    ],
)
def test_the_command_that_plan_ends_with_fits_as_it_says(given, run, text_of, tmp_path):
    LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        vocab_size=32000,
    ).save_pretrained(tmp_path)  # fmt: skip
    words = ["plan", tmp_path, "--seq-len", 1024, *given.split()]
    alone = run(*words)[1]
    least = min(alone["items"]["runtime"], alone["training_bytes"])  # no setting changes it
    words += ["--budget", (least + alone["training_bytes"]) // 2]
    together = run(*words)[1]["together"]
    _, _, command = text_of(*words).partition(" in all: modulora ")
    _, again, _ = run(*shlex.split(command))
    assert again["fits"]
    assert again["training_bytes"] == pytest.approx(together["training_bytes"], rel=0.02)


@pytest.mark.parametrize(
    ("words", "following"),
    [
        ("{source} -q toy -o levels=63 --quantize-head toy:levels=7 --quantize-embeddings verbatim",
         "quantize {source} PACKED -q toy -o levels=63 --quantize-head toy:levels=7 "
         "--quantize-embeddings verbatim"),
        ("{packed} --rank 4 --optim adafactor",
         "finetune {packed} ADAPTER --data SOURCE --rank 4 --seq-len 32 --optim adafactor"),
    ],
)  # fmt: skip
def test_the_next_command_does_what_was_planned(words, following, text_of, source, packed):
    text = text_of("plan", *words.format(source=source, packed=packed).split(), "--seq-len", 32)
    assert text.endswith(f"Next: modulora {following.format(source=source, packed=packed)}")


def test_without_a_quantizer_plan_has_a_line_for_each(text_of, source, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    others = {entry.name for entry in registry.entries()} - {"toy", "verbatim"}
    monkeypatch.setenv("MODULORA_BLOCK", ",".join(others))
    picture = tmp_path / "plan.svg"
    text = text_of("plan", source, "--seq-len", 32, "--budget", "8GiB", "--plot", picture)
    assert text.startswith("quantizer bits packed training decoding quantizing fits toy")
    assert text.split().count("yes") == 2
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{source}", "-o", "bits=2"], "option bits=2: expected -q NAME beside it"),
        (["{packed}", "-q", "toy"], "quantizer toy: expected a model that isn't packed"),
        (["{source}", "-q", "toy", "--dtype", "float16"], "expected a GPU"),
        (["{source}", "-q", "toy", "--mapped", "--device", "cuda"], "expected the device cpu"),
        (["{source}", "-q", "toy", "--plot", "plan.gif"], "a name that ends in .svg, .png, .pdf"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(words, message, source, packed, capsys):
    capsys.readouterr()
    model, *options = (word.format(source=source, packed=packed) for word in words)
    length = [] if "--seq-len" in options else ["--seq-len", "32"]
    assert main(["plan", model, *length, *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
