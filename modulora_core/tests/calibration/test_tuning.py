"""Tuning a quantized block towards the dense one: what is trained, how it is judged, and what it never does."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from modulora_core.calibration import (
    CalibrationConfig,
    Tuner,
    TuningConfig,
    find_blocks,
    load_calibration,
    spill_bytes,
)
from modulora_core.calibration.observe import Key, ObservedWeight, ignore
from modulora_core.calibration.tuning import learning_rate_factor, relative_error
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.errors import DataError, OptionError, WorkError
from modulora_core.packed import ChannelScales
from modulora_core.models import open_model
from modulora_core.quantization.quantize import QuantizeResult, quantize
from modulora_core.spec import PackedWeight
from modulora_core.tests.scaled_quantizer import installed, save_model_with_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TUNING = TuningConfig(epochs=6, learning_rate=2e-2, batch_size=2)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    with installed(tmp_path_factory.mktemp("scaled-site")) as module:
        yield module


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer("llama", tmp_path_factory.mktemp("models") / "llama")


def config(tuning: TuningConfig | None = TUNING, **changed: Any) -> CalibrationConfig:
    return CalibrationConfig(
        "pydoc[:10%]", tuning=tuning, **{"samples": 18, "seq_len": 24, "batch_size": 4, **changed}
    )


def run(
    source: Path, out: Path, tuning: TuningConfig | None = TUNING, **changed: Any
) -> QuantizeResult:
    return quantize(str(source), out, "scaled", calibration=config(tuning, **changed), seed=1)


def samples_of(source: Path) -> Tensor:
    return load_calibration(config(), open_model(str(source)).tokenizer(), seed=1).ids


def block_outputs(model: nn.Module, blocks: tuple[str, ...], ids: Tensor) -> list[Tensor]:
    """The hidden state after each of these decoder blocks of a whole model in memory."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, given: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    hooks = [model.get_submodule(path).register_forward_hook(note) for path in blocks]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def error(output: Tensor, target: Tensor) -> float:
    tokens = zip(output.flatten(0, -2).double(), target.flatten(0, -2).double(), strict=True)
    errors = [float((y - t).norm() ** 2 / t.norm() ** 2) for y, t in tokens]
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "float32"), ("llama-biased", "bfloat16"), ("gpt2", "float32"), ("gemma3_text", "bfloat16"), ("mixtral", "float32"),
     ("gpt_oss", "float32"), ("deepseek_v3", "float32")],
)  # fmt: skip
def test_the_error_that_is_told_is_the_checkpoints_own_and_smaller_than_before(
    architecture: str, dtype: str, scaled: ModuleType, tmp_path: Path
) -> None:
    source = save_model_with_tokenizer(architecture, tmp_path / "model", dtype)
    result = run(source, tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, experts_implementation="eager"
    )
    held_out = samples_of(source)[-1:]  # of 18 samples
    blocks = find_blocks(dense)
    targets = block_outputs(dense.eval(), blocks, held_out)
    outputs = block_outputs(
        load_model(tmp_path / "out", dtype="float32", device="cpu"), blocks, held_out
    )
    assert result.tuning_errors is not None
    assert tuple(result.tuning_errors) == blocks
    for (before, after), output, target in zip(
        result.tuning_errors.values(), outputs, targets, strict=True
    ):
        assert after == pytest.approx(error(output, target), rel=1e-3)
        assert (
            after <= before
        )  # a block that doesn't become better stays, which depends on the text that Python brings
    assert sum(after for _, after in result.tuning_errors.values()) < sum(
        before for before, _ in result.tuning_errors.values()
    )


def test_the_first_blocks_error_before_is_that_of_the_untuned_checkpoint(
    llama: Path, scaled: ModuleType, tmp_path: Path
) -> None:
    told = run(llama, tmp_path / "tuned").tuning_errors
    run(llama, tmp_path / "untuned", None)
    held_out = samples_of(llama)[-1:]
    assert told is not None
    first = tuple(told)[:1]
    [target] = block_outputs(AutoModelForCausalLM.from_pretrained(llama).eval(), first, held_out)
    [output] = block_outputs(load_model(tmp_path / "untuned", device="cpu"), first, held_out)
    assert told[first[0]][0] == pytest.approx(error(output, target), rel=1e-3)


def test_logits_on_other_text_come_nearer_to_the_dense_models(
    llama: Path, scaled: ModuleType, tmp_path: Path
) -> None:
    ids = load_calibration(
        CalibrationConfig("pydoc[90%:]", samples=8, seq_len=24),
        open_model(str(llama)).tokenizer(),
        seed=0,
    ).ids
    dense = AutoModelForCausalLM.from_pretrained(llama).eval()
    distance = {}
    for name, tuning in (("tuned", TUNING), ("untuned", None)):
        run(llama, tmp_path / name, tuning)
        with torch.no_grad():
            difference = load_model(tmp_path / name, device="cpu")(ids).logits - dense(ids).logits
        distance[name] = float(difference.norm())
    assert distance["tuned"] < 0.95 * distance["untuned"]


def changed(tuned: Path, untuned: Path) -> set[str]:
    a, b = (load_file(folder / "model.safetensors") for folder in (tuned, untuned))
    assert {n: (t.dtype, t.shape) for n, t in a.items()} == {
        n: (t.dtype, t.shape) for n, t in b.items()
    }
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("architecture", ["llama-biased", "gpt2"])
def test_scales_norms_and_biases_change_and_nothing_else_does(
    architecture: str, scaled: ModuleType, tmp_path: Path
) -> None:
    source = save_model_with_tokenizer(architecture, tmp_path / "model", "bfloat16")
    run(source, tmp_path / "tuned")
    run(source, tmp_path / "untuned", None)
    first = find_blocks(AutoModelForCausalLM.from_pretrained(source))[
        0
    ]  # later ones see other inputs
    stored = load_file(tmp_path / "tuned" / "model.safetensors")
    trained = {
        name for name, tensor in stored.items() if name.startswith(first) and tensor.dim() == 1
    }
    # k's bias adds the same to all of a query's scores, where the softmax doesn't see it, but rotary angles turn it
    found = {
        name for name in changed(tmp_path / "tuned", tmp_path / "untuned") if name.startswith(first)
    }
    assert found == trained
    assert not [
        n for n in changed(tmp_path / "tuned", tmp_path / "untuned") if not n.startswith(first[:-1])
    ]


def test_experts_get_no_scales_and_a_routers_stored_buffer_stays(
    scaled: ModuleType, tmp_path: Path
) -> None:
    source = save_model_with_tokenizer("deepseek_v3", tmp_path / "model")
    run(source, tmp_path / "tuned")
    run(source, tmp_path / "untuned", None)
    stored = load_file(tmp_path / "tuned" / "model.safetensors")
    assert any("e_score_correction_bias" in name for name in stored)
    found = changed(tmp_path / "tuned", tmp_path / "untuned")
    assert any(name.endswith("o_proj.weight.columns") for name in found)
    assert not [name for name in found if ".experts." in name or "e_score_correction_bias" in name]


def ruined(
    self: Any, packed: PackedWeight, input_scale: Tensor, output_scale: Tensor
) -> PackedWeight:
    return PackedWeight(
        "scaled", 1, packed.shape, {**packed.tensors, "rows": -1e3 * packed.tensors["rows"]}
    )


DIVERGING = TuningConfig(epochs=1, learning_rate=1e30, batch_size=2)


@pytest.mark.parametrize("how", ["folding ruins it", "training diverges"])
def test_a_block_that_did_not_become_better_stays_as_it_was_quantized(
    how: str, llama: Path, scaled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "folding ruins it":
        monkeypatch.setattr(scaled.Scaled, "rescaled", ruined)
    result = run(llama, tmp_path / "tuned", TUNING if how == "folding ruins it" else DIVERGING)
    run(llama, tmp_path / "untuned", None)
    assert not changed(tmp_path / "tuned", tmp_path / "untuned")
    assert result.tuning_errors is not None
    assert all(before == after for before, after in result.tuning_errors.values())


def test_a_rescaled_weight_of_another_layout_is_refused(
    llama: Path, scaled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wider(self: Any, packed: PackedWeight, *scales: Tensor) -> PackedWeight:
        return PackedWeight(
            "scaled", 1, packed.shape, {**packed.tensors, "rows": packed.tensors["rows"].float()}
        )

    monkeypatch.setattr(scaled.Scaled, "rescaled", wider)
    with pytest.raises(WorkError, match=r"q_proj\.weight: scaled rescaled it as"):
        run(llama, tmp_path / "out")


def test_one_block_is_dense_at_a_time_while_it_is_tuned(
    llama: Path, scaled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[ObservedWeight] = weakref.WeakSet()
    made, taken, counts = ObservedWeight.__init__, Tuner.take_up, []

    def counted(self: ObservedWeight, *given: Any) -> None:
        made(self, *given)
        alive.add(self)

    def watched(self: Tuner, *given: Any) -> None:
        counts.append(len(alive))
        taken(self, *given)
        counts.append(len(alive))

    monkeypatch.setattr(ObservedWeight, "__init__", counted)
    monkeypatch.setattr(Tuner, "take_up", watched)
    gc.disable()  # what a block holds must go when it is done, not when a collector comes by
    try:
        run(llama, tmp_path / "out")
    finally:
        gc.enable()
    assert counts == [7, 7, 7, 7]
    assert not alive


def test_both_streams_of_hidden_states_count_in_the_disk_check(llama: Path) -> None:
    source = open_model(str(llama))
    sizes = {}
    for name, tuning in (("tuned", TUNING), ("untuned", None)):
        text = load_calibration(config(tuning, spill=True), source.tokenizer(), seed=1)
        sizes[name] = spill_bytes(text, source.config, torch.device("cpu"))
    assert sizes == {"tuned": 2 * 18 * 24 * 32 * 4, "untuned": 18 * 24 * 32 * 4}


def test_scales_multiply_columns_and_rows_and_have_exact_gradients(
    generator: torch.Generator,
) -> None:
    W, x, b, u, v = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                     for shape in ((5, 3), (2, 4, 3), (5,), (3,), (5,)))  # fmt: skip
    observed = ObservedWeight(Key("weight"), W, ignore)

    def product(x: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
        observed.scales = ChannelScales(u, v)
        return observed.multiply(x, b)

    torch.testing.assert_close(product(x, b, u, v), x @ (v.diag() @ W @ u.diag()).t() + b)
    assert torch.autograd.gradcheck(product, [tensor.requires_grad_() for tensor in (x, b, u, v)])


def test_each_token_counts_alike_in_the_error(generator: torch.Generator) -> None:
    target = torch.randn(2, 3, 8, generator=generator)
    output = target + torch.randn(2, 3, 8, generator=generator)
    plain = float(relative_error(output, target))
    assert plain == pytest.approx(error(output, target), rel=1e-5)
    size = torch.tensor([1000.0, 1, 1])[:, None]
    assert float(relative_error(output * size, target * size)) == pytest.approx(plain, rel=1e-5)


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert max(factors) == factors[4] == 1
    assert factors[:5] == sorted(factors[:5])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[0] < 0.25
    assert 0 < factors[-1] < 0.01
    assert learning_rate_factor(0, 1) == 1


@pytest.mark.parametrize(("samples", "trained"), [(2, 1), (15, 14), (16, 15), (33, 31)])
def test_every_sample_is_trained_on_or_held_out(samples: int, trained: int) -> None:
    steps, held_out = TuningConfig(batch_size=4).batches(samples, 512)
    assert [i for batch in steps for i in range(samples)[batch]] == list(range(trained))
    assert [i for batch in held_out for i in range(samples)[batch]] == list(range(trained, samples))
    assert max(batch.stop - batch.start for batch in steps) <= 4


def test_wrong_numbers_are_refused() -> None:
    name: str
    value: Any
    for name, value in (
        ("epochs", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("batch_size", 0),
    ):
        with pytest.raises(OptionError, match=f"tuning {name}: expected"):
            TuningConfig(**{name: value})
    with pytest.raises(DataError, match="at least 2 calibration samples"):
        TuningConfig().batches(1, 512)
