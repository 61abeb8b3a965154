"""A comparison measures each quantizer before and after, continues, and is one page."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from modulora_compare.cli.compare import PAGE
from modulora_compare.comparison import measure as comparison
from modulora_compare.comparison.measure import Measured, Method, Request, compare, difference
from modulora_compare.comparison.page import page
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf
from safetensors.torch import load_file, save_file

from modulora_core.cli import main
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune


def test_the_interval_is_around_the_mean_of_paired_differences():
    base = [3.0 + 0.1 * (i % 7) for i in range(64)]
    mean, low, high = difference([each + 0.05 for each in base], base)
    assert (mean, low, high) == pytest.approx((0.05, 0.05, 0.05))
    noise = [each + (0.2 if i % 2 else -0.2) for i, each in enumerate(base)]
    mean, low, high = difference(noise, base)
    assert low < mean < high
    assert low < 0 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 64**0.5, rel=0.1)  # the normal interval


@pytest.fixture
def request_(tmp_path, toy, monkeypatch):
    monkeypatch.setenv("MODULORA_CACHE", str(tmp_path / "cache"))
    save_llama_with_tokenizer(tmp_path / "dense")
    text = " ".join(f"The number {i} follows {i - 1}." for i in range(400))
    (tmp_path / "notes.txt").write_text(text, "utf-8")
    notes = str(tmp_path / "notes.txt")
    return Request(
        model=str(tmp_path / "dense"), train=f"{notes}[:90%]", held_out=f"{notes}[90%:]",
        quantizers=("toy",), steps=1, batch_size=1, seq_len=16, segments=3, device="cpu",
    )  # fmt: skip


def test_each_quantizer_is_measured_once_and_the_page_has_all(request_, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    steps = []
    shown = []
    original, toy = compare(
        request_, out, lambda *call: shown.append(call), lambda *call: steps.append(call)
    )
    assert original.name == "original"
    titles = ["measuring original", "quantizing with toy", "measuring toy", "finetuning toy",
              "measuring toy, finetuned"]  # fmt: skip
    assert steps == [(title, i, 5) for i, title in enumerate(titles)]
    # the bar of a measurement is full only after the last answer: 3 segments and 3 prompts
    assert shown.index(("original: answering", 5, 6)) < shown.index(("measured original", 6, 6))
    assert not [call for call in shown if call[0] == "measuring original" and call[1] == call[2]]
    assert original.after is None  # a dense model takes no adapter here
    assert toy.after is not None
    assert toy.nbytes < original.nbytes
    assert len(toy.before.losses) == len(original.before.losses) == 3
    assert toy.after.losses != toy.before.losses

    with monkeypatch.context() as patched:  # nothing is done again
        for done in ("_quantized", "_trained", "_measured"):
            patched.setattr(comparison, done, None)
        assert compare(request_, out, False) == [original, toy]

    for file in out.glob("toy-*.json"):  # an interrupted comparison lost these, and no folders
        file.unlink()
    again = compare(request_, out, False)[1]
    assert again.after is not None
    assert again.after.losses == toy.after.losses
    assert toy.quantizing_seconds is not None
    assert again.quantizing_seconds is again.training_peak_bytes is None  # none was needed

    with monkeypatch.context() as patched:  # another seed has the packed model
        patched.setattr(comparison, "_quantized", None)
        other = compare(replace(request_, seed=1), out, False)[1]
    assert other.before == again.before
    assert other.after is not None
    assert other.after.losses != toy.after.losses

    assert comparison.has_large_embedding(request_.model)
    small = compare(replace(request_, embeddings="toy", steps=0), out, False)[1]
    assert small.nbytes < toy.nbytes

    text = page(request_, [original, toy], "modulora compare MODEL")
    for part in ("toy, finetuned", "modulora compare MODEL", "<svg", f"{toy.after.perplexity:.2f}"):
        assert part in text
    assert "<script" not in text
    assert "<polyline" not in text  # a line would join quantizers that have nothing in common
    assert 'data-head="perplexity"' in text  # a narrow page has each row as a list


def test_a_packed_original_has_steps_for_its_finetuning(request_, tmp_path):
    file = write_tiny_gguf("llama", tmp_path / "model.gguf", "Q8_0")
    steps = []
    request = replace(request_, model=str(file), quantizers=())
    (tmp_path / "out").mkdir()
    [original] = compare(request, tmp_path / "out", False, lambda *call: steps.append(call))
    assert original.after is not None
    assert [call[1:] for call in steps] == [(0, 3), (1, 3), (2, 3)]


def test_few_segments_make_no_claim():
    def text(segments):
        request = Request(model="m", train="t", held_out="h", quantizers=("q",), prompts=0)
        losses = [[3 + 0.1 * i for i in range(segments)], [2.9 + 0.1 * i for i in range(segments)]]
        made = [Measured(each, 0.0, 1, []) for each in losses]
        return page(request, [Method(n, n, 2**20, m) for n, m in zip("oq", made, strict=True)], "")

    assert "<td" in text(19)
    assert "say nothing about which is better" in text(19)
    assert "[-0.100" not in text(19)
    assert "[-0.100, -0.100]" in text(20)
    assert "An interval without 0 is a difference" in text(20)


def test_the_command_on_the_page_repeats_the_comparison(request_, tmp_path):
    out, data = str(tmp_path / "out"), request_.train.partition("[")[0]
    words = ["compare", request_.model, "--data", data, "-q", "toy", "--eval-data", data]
    words += ["--device", "cpu", "--quantize-embeddings", "none", "--finetune-steps", "0"]
    words += ["--batch-size", "1", "--seq-len", "16", "--segments", "2", "--samples", "3"]
    words += ["--out", out]
    assert main(words) == 0
    assert f"modulora {shlex.join(words)}" in (tmp_path / "out" / PAGE).read_text("utf-8")


def test_it_takes_the_packed_model_of_finetune_and_packs_again_what_is_gone(request_, tmp_path):
    config = FinetuneConfig(
        model=request_.model, out=str(tmp_path / "adapter"), data=request_.train, quantizer="toy",
        steps=1, batch_size=1, seq_len=16, baseline=False,
    )  # fmt: skip
    packed = finetune(config).model
    out = tmp_path / "out"
    out.mkdir()
    request = replace(request_, steps=0, prompts=0)
    found = compare(request, out, False)[1]
    assert (found.model, found.quantizing_seconds) == (packed, None)
    shutil.rmtree(packed)
    assert compare(request, out, False)[1] == found
    assert (Path(packed) / "config.json").is_file()


def test_other_weights_in_the_same_folder_are_measured_again(request_, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    request = replace(request_, prompts=0)
    before = compare(request, out, False)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in weights.items()}
    save_file(changed, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    after = compare(request, out, False)
    for old, new in zip(before, after, strict=True):
        assert new.before.losses != old.before.losses
    assert before[1].after is not None
    assert after[1].after is not None
    assert after[1].after.losses != before[1].after.losses
