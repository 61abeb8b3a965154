"""What a finetuning run may do about memory changes where things are and when, and no number that comes out."""

from __future__ import annotations

import importlib.util
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from modulora_core import optimizers
from modulora_core.adapters import LoRASettings, add_lora
from modulora_core.checkpoint import load_model
from modulora_core.data.sources import pydoc_text
from modulora_core.deferred_logits import DeferredLogits
from modulora_core.errors import MissingExtraError, OptionError
from modulora_core.finetune import FinetuneResult, finetune
from modulora_core.finetune_config import FinetuneConfig
from modulora_core.offload import DiskFile
from modulora_core.optimizers import step_one_by_one
from modulora_core.quantize import quantize
from modulora_core.tests.adapted_models import save_llama_with_tokenizer

Configure = Callable[..., FinetuneConfig]

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
AT_ONCE = {"apply_gradients_at_once": True, "grad_accum": 1, "max_grad_norm": 0}


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
    return lambda out, **options: FinetuneConfig.build({**defaults, "out": str(root / out), **options})


def outcome(result: FinetuneResult) -> tuple[list[float], float | None, bytes]:
    """All that a run computes."""
    return result.losses, result.eval_loss, (Path(result.out) / "adapter_model.safetensors").read_bytes()


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


@pytest.mark.parametrize(
    ("options", "besides"),
    [
        ({"offload_activations": True}, {}),
        ({"offload_optimizer": True}, {}),
        ({"keep_products": "exact"}, {}),
        ({"keep_products": "rounded"}, {"keep_products": "rounded"}),
        (AT_ONCE, {"grad_accum": 1, "max_grad_norm": 0}),
        (
            {**AT_ONCE, "offload_optimizer": True, "offload_activations": True, "keep_products": "exact"},
            {"grad_accum": 1, "max_grad_norm": 0},
        ),
    ],
    ids=["activations", "optimizer", "products", "products in eight bits", "at once", "all"],
)
def test_a_run_computes_the_same_bits_and_goes_on_after_an_interruption(
    configure: Configure, plain: Callable[..., FinetuneResult], options: dict[str, Any], besides: dict[str, Any],
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kept: list[Tensor] = []
    keep = DiskFile.keep
    monkeypatch.setattr(DiskFile, "keep", lambda self, tensor: kept.append(tensor) or keep(self, tensor))
    config = configure(request.node.name, **options)
    interrupt(config, 5)
    assert outcome(finetune(config, resume=True)) == outcome(plain(**besides))
    assert (len(kept) > 0) == any(name.startswith("offload") for name in options)


def interrupt(config: FinetuneConfig, step: int) -> None:
    def on_step(told: Any) -> None:
        if told.step == step:
            raise Stop

    with pytest.raises(Stop):
        finetune(config, on_step=on_step)


@needs_bitsandbytes
@pytest.mark.parametrize("options", [{}, {**AT_ONCE, "offload_optimizer": True}], ids=["plain", "all"])
def test_moments_in_8_bits_train_nearly_as_well_and_resume(
    configure: Configure,
    plain: Callable[..., FinetuneResult],
    options: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    besides = {name: value for name, value in options.items() if name in ("grad_accum", "max_grad_norm")}
    eight = finetune(configure(f"8 {request.node.name}", optimizer="adamw-8bit", **options))
    exact = plain(**besides)
    assert eight.losses != exact.losses
    fallen = exact.losses[0] - exact.losses[-1]
    assert fallen > 0.1
    assert eight.losses == pytest.approx(exact.losses, abs=fallen / 5), (
        "rounding moments isn't forgetting them"
    )
    config = configure(f"8 again {request.node.name}", optimizer="adamw-8bit", **options)
    interrupt(config, 5)
    states = torch.load(Path(config.out) / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)
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


def test_8_bits_without_their_library_are_refused_before_any_work(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    config = configure("no library", optimizer="adamw-8bit")
    with pytest.raises(MissingExtraError, match=r"bitsandbytes.*pip install 'modulora-core\[optimizers\]'"):
        finetune(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**AT_ONCE, "grad_accum": 4}, "so none add up: expected grad_accum 1, got 4"),
        ({**AT_ONCE, "max_grad_norm": 1.5}, "so their norm is never known: expected max_grad_norm 0, got 1.5"),
        ({**AT_ONCE, "dtype": "float16"}, "float16's are scaled until all are: expected another dtype"),
        ({"offload_activations": True, "gradient_checkpointing": False}, "expected gradient_checkpointing, got none"),
        ({"keep_products": "rounded", "gradient_checkpointing": False}, "expected gradient_checkpointing, got none"),
    ],
    ids=["accumulation", "clipping", "float16", "nothing to offload", "nothing to keep"],
)  # fmt: skip
def test_what_doesnt_go_together_is_refused(
    configure: Configure, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        configure("refused", **options)


def test_what_routes_to_experts_isnt_rounded(
    configure: Configure, pack: Callable[..., tuple[Path, Path]], wide: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "experts"
    shutil.copytree(pack("mixtral", "toy")[1], folder)
    for file in wide.glob("*token*"):
        shutil.copy(file, folder)
    config = configure("experts", model=str(folder), seq_len=16, rank=8, keep_products="rounded")
    with pytest.raises(OptionError, match="expected exact or none for a model with experts, got rounded"):
        finetune(config)
    assert not Path(config.out).exists()


def test_no_logits_are_whole_in_training_and_evaluation(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(logits: DeferredLogits) -> Tensor:
        raise AssertionError(f"all of {list(logits.shape)} was asked for")

    monkeypatch.setattr(DeferredLogits, "whole", fail)
    assert finetune(configure("chunks", steps=1)).eval_loss is not None


def test_gradients_applied_at_once_are_never_there_together(tunable: Path) -> None:
    model = load_model(tunable)
    add_lora(model, LoRASettings(rank=4, dropout=0.0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    alive, most = weakref.WeakSet[Tensor](), 0

    def count(parameter: Tensor) -> None:
        nonlocal most
        assert parameter.grad is not None
        alive.add(parameter.grad)
        most = max(most, len(alive))

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(count)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    step_one_by_one(optimizer, None, at_once=True)
    ids = torch.arange(3, 27).view(2, 12)
    model(ids, labels=ids).loss.backward()
    assert len(trained) == 28
    assert most <= 2, "A and B of one layer: autograd gets both from one function"
    assert all(parameter.grad is None for parameter in trained)
    moved = [not torch.equal(old, new) for old, new in zip(before, trained, strict=True)]
    assert sum(moved) == 14, "each B; A's gradient is zero as long as B is"
