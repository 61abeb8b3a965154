"""Options that save memory change no number that a finetuning run computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from modulora_core.data.sources import pydoc_text
from modulora_core.errors import MissingExtraError, OptionError
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.deferred_logits import DeferredLogits
from modulora_core.training.finetune import FinetuneResult, finetune

Configure = Callable[..., FinetuneConfig]

pytestmark = pytest.mark.usefixtures("one_thread")


class Stop(Exception):  # noqa: N818
    """Interrupts a run."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(pydoc_text()[:2000])
    return folder


@pytest.fixture(scope="module")
def wide(toy: ModuleType, root: Path) -> Path:
    """A packed Llama whose layers can have a rank of 64: bitsandbytes leaves moments of less than 64 × 64 values in 32 bits."""
    save_llama_with_tokenizer(root / "dense", hidden_size=64, intermediate_size=128)
    quantize(str(root / "dense"), root / "packed", "toy")
    return root / "packed"


@pytest.fixture(scope="module")
def configure(wide: Path, root: Path) -> Configure:
    """Five steps with dropout and a checkpoint every two. States between blocks, 4 × 128 × 64, are large enough to be offloaded."""
    text = str(root / "text.txt")
    defaults = {"model": str(wide), "data": text, "eval_data": text, "steps": 5, "batch_size": 4, "grad_accum": 2,
                "seq_len": 128, "lr": 1e-2, "save_every": 2, "rank": 64}  # fmt: skip
    return lambda out, **options: FinetuneConfig.build(
        {**defaults, "out": str(root / out), **options}
    )


def outcome(result: FinetuneResult) -> tuple[list[float], float | None, bytes]:
    """All that a run computes."""
    return (
        result.losses,
        result.eval_loss,
        (Path(result.out) / "adapter_model.safetensors").read_bytes(),
    )


@pytest.fixture(scope="module")
def plain(configure: Configure, one_thread: None) -> Callable[..., FinetuneResult]:
    """Runs without any of it, made once for the same options."""
    made: dict[str, FinetuneResult] = {}

    def run(**options: Any) -> FinetuneResult:
        name = f"plain {sorted(options.items())}"
        if name not in made:
            made[name] = finetune(configure(name, **options))
        return made[name]

    return run


def test_a_run_that_keeps_products_computes_the_same_bits_and_resumes(
    configure: Configure, plain: Callable[..., FinetuneResult]
) -> None:
    config = configure("kept", keep_products=True)
    interrupt(config, 5)
    assert outcome(finetune(config, resume=True)) == outcome(plain())


def interrupt(config: FinetuneConfig, step: int) -> None:
    def on_step(told: Any) -> None:
        if told.step == step:
            raise Stop

    with pytest.raises(Stop):
        finetune(config, on_step=on_step)


def test_any_optimizer_of_transformers_trains_and_resumes(
    configure: Configure, plain: Callable[..., FinetuneResult]
) -> None:
    pytest.importorskip("bitsandbytes")
    eight = finetune(configure("8", optim="adamw_bnb_8bit"))
    exact = plain()
    assert eight.losses != exact.losses
    fallen = exact.losses[0] - exact.losses[-1]
    assert fallen > 0.1
    assert eight.losses == pytest.approx(exact.losses, abs=fallen / 5), (
        "rounding moments isn't forgetting them"
    )
    config = configure("8 again", optim="adamw_bnb_8bit")
    interrupt(config, 5)
    states = torch.load(
        Path(config.out) / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True
    )
    assert largest_moment(states).dtype == torch.uint8
    assert outcome(finetune(config, resume=True)) == outcome(eight)


def largest_moment(states: dict[str, Any]) -> Tensor:
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)

    collect(states["state"])
    return max(found, key=Tensor.numel)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "adamw_torhc",
            OptionError,
            "transformers has no such optimizer; did you mean adamw_torch",
        ),
        ("galore_adamw", MissingExtraError, "galore_torch"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_refused_before_any_work(
    configure: Configure, name: str, error: type[Exception], message: str
) -> None:
    config = configure(name, optim=name)
    with pytest.raises(error, match=message):
        finetune(config)
    assert not Path(config.out).exists()


def test_offloading_on_a_cpu_is_refused(configure: Configure) -> None:
    with pytest.raises(OptionError, match="offload_activations: expected a GPU"):
        finetune(configure("on a CPU", offload_activations=True))


def test_keeping_products_without_checkpointing_is_refused(configure: Configure) -> None:
    with pytest.raises(OptionError, match="expected gradient_checkpointing, got none"):
        configure("refused", keep_products=True, gradient_checkpointing=False)


def test_no_logits_are_whole_in_training_and_evaluation(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(logits: DeferredLogits) -> Tensor:
        raise AssertionError(f"all of {list(logits.shape)} was asked for")

    monkeypatch.setattr(DeferredLogits, "whole", fail)
    assert finetune(configure("chunks", steps=1)).eval_loss is not None
