"""Training in rounds gives one packed model, with one learning rate, and can be interrupted."""

import json

import pytest
import torch
from modulora_evaluate.evaluate import evaluate
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf
from modulora_merge import rounds
from modulora_merge.config import RoundsConfig
from modulora_merge.rounds import finetune_packed

from modulora_core.checkpoints.opening import open_packed
from modulora_core.cli import main as run
from modulora_core.errors import DataError, OptionError, OutputError
from modulora_core.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(model, out, text, **options):
    few = {
        "steps": 12, "merge_every": 5, "merge_seq_len": 32, "batch_size": 2, "seq_len": 32,
        "lr": 1e-2,
    }  # fmt: skip
    return RoundsConfig(model=str(model), out=str(out), data=str(text), **few | options)


def tensors(folder):
    return open_packed(str(folder)).tensors()


def test_the_result_is_one_packed_model_that_is_better(trained, text, tmp_path):
    packed, _ = trained("nf4")
    result = finetune_packed(
        config_of(packed, tmp_path / "out", text, steps=40, merge_every=20, eval_data=str(text)),
        progress=False,
    )
    assert (result.rounds, len(result.losses), len(result.changed)) == (2, 40, 2)
    assert result.perplexity is not None
    assert result.perplexity_before is not None
    assert result.perplexity < 0.9 * result.perplexity_before
    again = evaluate(tmp_path / "out", str(text), seq_len=32, segments=40, progress=False)
    assert again.perplexity == pytest.approx(result.perplexity)
    before, after = tensors(packed), tensors(tmp_path / "out")
    assert {name: t.shape for name, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_learning_rate_has_one_schedule_over_all_rounds(trained, text, tmp_path, monkeypatch):
    packed, _ = trained("nf4")
    rates = {"whole": [], "rounds": []}

    def watched(name):
        def trained_too(config, **options):
            return finetune(
                config, **options, on_step=lambda step: rates[name].append(step.learning_rate)
            )

        return trained_too

    monkeypatch.setattr(rounds, "finetune", watched("rounds"))
    config = config_of(packed, tmp_path / "out", text, warmup=0.25)
    finetune_packed(config, progress=False)
    whole = rounds._of_round(config, str(packed), tmp_path / "adapter", 0, 12)
    watched("whole")(whole, progress=False)
    assert rates["rounds"] == pytest.approx(rates["whole"])
    assert len(set(rates["whole"])) > 8


def test_an_interrupted_run_continues_to_the_same_bytes(trained, text, tmp_path, monkeypatch):
    packed, _ = trained("nf4")
    finetune_packed(config_of(packed, tmp_path / "whole", text), progress=False)
    config = config_of(packed, tmp_path / "out", text)
    merge, calls = rounds.merge_packed, []

    def stopped(model, out, **options):
        calls.append(out)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return merge(model, out, **options)

    monkeypatch.setattr(rounds, "merge_packed", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune_packed(config, progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="unfinished run; go on with it with --resume"):
        finetune_packed(config, progress=False)
    with pytest.raises(OptionError, match=r"got lr 0\.01 → 0\.02"):
        finetune_packed(config_of(packed, tmp_path / "out", text, lr=0.02), resume=True)
    finetune_packed(config, resume=True, progress=False)
    whole, out = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_a_file_becomes_a_file(text, tmp_path):
    write_tiny_gguf("llama", tmp_path / "model.gguf", "Q4_0")
    config = config_of(tmp_path / "model.gguf", tmp_path / "out.gguf", text, steps=4, merge_every=2)
    finetune_packed(config, progress=False)
    sizes = {(tmp_path / name).stat().st_size for name in ("model.gguf", "out.gguf")}
    assert len(sizes) == 1
    with pytest.raises(OutputError, match=r"expected a name \*\.gguf"):
        finetune_packed(config_of(tmp_path / "model.gguf", tmp_path / "folder", text))


def test_what_no_merge_takes_is_refused_before_the_first_round(toy, trained, text, tmp_path):
    packed, _ = trained("toy")
    with pytest.raises(OptionError, match="codes can move on a grid, got toy; use `modulora fine"):
        finetune_packed(config_of(packed, tmp_path / "out", text), progress=False)
    packed, _ = trained("nf4")
    with pytest.raises(DataError, match="at least seq_len 99999 tokens"):
        finetune_packed(config_of(packed, tmp_path / "out", text, merge_seq_len=99999))
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_what_does_not_fit_rounds(trained, text, tmp_path, capsys):
    packed, _ = trained("nf4")
    words = ["finetune-packed", str(packed), str(tmp_path / "out"), "--data", str(text), "--json"]
    assert run(words) == 2
    assert "steps: expected the number of optimizer steps" in capsys.readouterr().out
    (tmp_path / "a.yaml").write_text("steps: 2\nquality: best\nquantizer: nf4\n")
    assert run([*words, "--config", str(tmp_path / "a.yaml")]) == 2
    assert "quantizer: expected None in finetune-packed, got nf4" in capsys.readouterr().out
    few = ["--steps", "2", "--merge-every", "1", "--seq-len", "32", "--merge-seq-len", "32"]
    assert run([*words, *few]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 2
