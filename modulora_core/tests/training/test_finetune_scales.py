"""Finetuning with --train-scales: what trains, what is written, going on, and every command on the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modulora_core.adapters.lora import AdapterFolder, adapter_layers, load_adapter
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.cli import main
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import AdapterError, OptionError
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import FinetuneResult, finetune

Configure = Callable[..., FinetuneConfig]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(pydoc_text()[:1000])
    return folder


@pytest.fixture(scope="module")
def configure(tunable: Path, root: Path) -> Configure:
    text = str(root / "text.txt")
    defaults = {"model": str(tunable), "data": text, "eval_data": text, "steps": 8, "batch_size": 2,
                "grad_accum": 1, "seq_len": 64, "lr": 1e-2, "save_every": 2, "train_scales": True}  # fmt: skip
    return lambda out, **options: FinetuneConfig.build(
        {**defaults, "out": str(root / out), **options}
    )


@pytest.fixture(scope="module")
def whole(configure: Configure, one_thread: None) -> FinetuneResult:
    """A run, uninterrupted."""
    return finetune(configure("whole"))


def contents(result: FinetuneResult) -> list[bytes]:
    names = ("adapter_model.safetensors", "modulora_scales.safetensors")
    return [(Path(result.out) / name).read_bytes() for name in names]


def test_scales_train_beside_the_adapter_and_the_loss_falls(
    whole: FinetuneResult, configure: Configure
) -> None:
    assert whole.losses[-1] < whole.losses[0] - 0.2
    for delta in AdapterFolder(whole.out).values():
        assert delta.channel_scales is not None
        for vector in (delta.channel_scales.input, delta.channel_scales.output):
            moved = (vector - 1).abs().max()
            assert 1e-3 < moved < 0.1, "eight steps of Adam at 1e-2 go no further than 0.08"
    plain = finetune(configure("plain", train_scales=False))
    assert plain.losses[0] == whole.losses[0], "scales are one at first"
    assert plain.losses[-1] != whole.losses[-1]
    assert not (Path(plain.out) / "modulora_scales.safetensors").exists()


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    whole: FinetuneResult, configure: Configure
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(step: Any) -> None:
        if step.step == 5:
            raise Stop

    config = configure("interrupted")
    with pytest.raises(Stop):
        finetune(config, on_step=stop)
    checkpoint = Path(config.out) / "checkpoints" / "checkpoint-4"
    assert AdapterFolder(checkpoint).has_channel_scales
    steps: list[int] = []
    resumed = finetune(config, resume=True, on_step=lambda step: steps.append(step.step))
    assert steps == [5, 6, 7, 8]
    assert (resumed.losses, resumed.eval_loss) == (whole.losses, whole.eval_loss)
    assert contents(resumed) == contents(whole)


def test_a_run_is_not_resumed_with_or_without_scales_as_it_was_not_begun(
    whole: FinetuneResult, configure: Configure
) -> None:
    begun = Path(configure("begun").out)
    shutil.copytree(Path(whole.out) / "checkpoints", begun / "checkpoints")
    (begun / "finetune.yaml").write_text(configure("begun").to_yaml())
    with pytest.raises(OptionError, match="got others: train_scales True → False"):
        finetune(configure("begun", train_scales=False), resume=True)


def test_an_adapter_with_scales_is_trained_on_with_them(
    whole: FinetuneResult, configure: Configure
) -> None:
    config = configure(
        "further", adapter=whole.out, train_scales=None, dropout=0, warmup=0, steps=2
    )
    assert "train_scales" not in config.to_yaml()
    result = finetune(config)
    before, after = AdapterFolder(whole.out), AdapterFolder(result.out)
    for path, delta in after.items():
        assert not torch.equal(delta.channel_scales.input, before[path].channel_scales.input)
        assert not torch.equal(delta.channel_scales.output, before[path].channel_scales.output)
    assert "modulora_scales.safetensors" in (Path(result.out) / "README.md").read_text()


def test_train_scales_is_no_option_of_an_adapter_that_is_there(
    whole: FinetuneResult, configure: Configure
) -> None:
    with pytest.raises(
        OptionError, match=r"train_scales: the adapter .* has its own; leave it out"
    ):
        configure("other", adapter=whole.out)


def test_weight_decay_leaves_the_scales_where_they_are(configure: Configure) -> None:
    """A rate at which decay alone takes matrices to nothing in one step: 1 - lr × decay = 0."""
    options = {"steps": 1, "warmup": 0, "lr": 1e-6, "weight_decay": 1e6, "scheduler": "constant"}
    for delta in AdapterFolder(finetune(configure("decayed", **options)).out).values():
        assert delta.A.abs().max() < 1e-5
        for vector in (delta.channel_scales.input, delta.channel_scales.output):
            assert (vector - 1).abs().max() < 1e-5


def test_16_bit_activations_train_32_bit_scales(configure: Configure, tunable: Path) -> None:
    result = finetune(configure("short", dtype="bfloat16"))
    assert result.losses[-1] < result.losses[0]
    model = load_model(tunable, dtype="bfloat16")
    load_adapter(model, result.out)
    assert {layer.input_scale["default"].dtype for _, layer in adapter_layers(model)} == {
        torch.float32
    }


def test_the_model_card_says_that_peft_leaves_the_scales_out(
    whole: FinetuneResult, configure: Configure
) -> None:
    card = (Path(whole.out) / "README.md").read_text()
    assert "| train_scales | True |" in card
    assert "modulora_scales.safetensors, which PEFT warns that it leaves out" in card
    assert "library_name: peft" not in card, "the Hub would show how to load it with PEFT alone"


def test_every_command_takes_the_result(
    whole: FinetuneResult,
    tunable: Path,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: object) -> dict[str, Any]:
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    data = ("--data", root / "text.txt", "--seq-len", 32, "--segments", 4)
    tuned = run("evaluate", tunable, "--adapter", whole.out, *data)["perplexity"]
    assert tuned < run("evaluate", tunable, *data)["perplexity"]
    run("merge", tunable, tmp_path / "merged", "--adapter", whole.out, "--dtype", "float32")
    assert run("evaluate", tmp_path / "merged", *data)["perplexity"] == pytest.approx(
        tuned, rel=1e-4
    )
    assert (
        run("generate", tunable, "The", "--adapter", whole.out, "--max-new-tokens", 2)["tokens"]
        >= 1
    )
    assert run("info", whole.out)["channel_scales"] is True


def test_a_damaged_adapter_is_refused_before_the_model_is_loaded(
    whole: FinetuneResult, configure: Configure, tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "modulora.json"):
        (tmp_path / name).write_bytes((Path(whole.out) / name).read_bytes())
    config = configure("refused", adapter=str(tmp_path), train_scales=None)
    with pytest.raises(AdapterError, match=r"modulora_scales\.safetensors: expected the adapter's channel scales"):  # fmt: skip
        finetune(config)
    assert not Path(config.out).exists()


def test_the_flag_is_told_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    assert "--train-scales" in capsys.readouterr().out
