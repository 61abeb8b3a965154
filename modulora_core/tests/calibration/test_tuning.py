"""Tuning a quantized block towards the dense block: its effect, its judge, and its limits."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from modulora_core.calibration import (
    CalibrationConfig,
    TuningConfig,
    calibration_text,
    find_blocks,
)
from modulora_core.hf.load_model import load_model
from modulora_core.models import open_dense
from modulora_core.packed import PackedWeight
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.scaled_quantizer import installed, save_model_with_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TUNING = TuningConfig(epochs=6, learning_rate=2e-2, batch_size=2)
TEXT = {"samples": 18, "seq_len": 24, "batch_size": 4}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("scaled-site")) as module:
        yield module


@pytest.fixture(scope="module")
def llama(scaled, tmp_path_factory):
    return save_model_with_tokenizer("llama", tmp_path_factory.mktemp("models") / "llama")


def run(source, out, tuning=TUNING):
    config = CalibrationConfig("pydoc[:10%]", tuning=tuning, **TEXT)
    return quantize(str(source), out, "scaled", calibration=config, seed=1)


def samples_of(source, text="pydoc[:10%]"):
    config = CalibrationConfig(text, **TEXT)
    return calibration_text(open_dense(str(source)), config, seed=1).ids


def dense(source):
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def block_outputs(model, blocks, ids):
    """The hidden state after each of these decoder blocks of a whole model in memory."""
    outputs = {}
    for path in blocks:

        def note(_module, _given, output, path=path):
            outputs[path] = output if isinstance(output, Tensor) else output[0]

        model.get_submodule(path).register_forward_hook(note)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return outputs


def error(output, target):
    tokens = zip(output.flatten(0, -2).double(), target.flatten(0, -2).double(), strict=True)
    errors = [float((y - t).norm() ** 2 / t.norm() ** 2) for y, t in tokens]
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama-biased", "bfloat16"),
        ("gpt_oss", "float32"),
        pytest.param("gpt2", "float32", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "float32", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_reported_error_is_the_checkpoints_own_and_smaller_than_before(
    architecture, dtype, scaled, tmp_path
):
    source = save_model_with_tokenizer(architecture, tmp_path / "model", dtype)
    errors = run(source, tmp_path / "out").tuning_errors
    assert errors is not None
    model, held_out = dense(source), samples_of(source)[-1:]  # of 18 samples
    assert tuple(errors) == find_blocks(model)
    packed = load_model(tmp_path / "out", dtype="float32", device="cpu")
    targets, outputs = (block_outputs(each, errors, held_out) for each in (model, packed))
    for path, (before, after) in errors.items():
        assert after == pytest.approx(error(outputs[path], targets[path]), rel=1e-3)
        assert after <= before  # one block may stay as it was, which depends on Python's text
    assert sum(after for _, after in errors.values()) < sum(before for before, _ in errors.values())


def test_tuned_logits_on_other_text_are_nearer_to_the_dense_models(llama, tmp_path):
    errors = run(llama, tmp_path / "tuned").tuning_errors
    run(llama, tmp_path / "untuned", None)
    tuned, untuned = (load_model(tmp_path / name, device="cpu") for name in ("tuned", "untuned"))
    ids, model = samples_of(llama, "pydoc[90%:]"), dense(llama)
    with torch.no_grad():
        tuned_distance, distance = (
            float((each(ids).logits - model(ids).logits).norm()) for each in (tuned, untuned)
        )
    assert tuned_distance < 0.95 * distance
    assert errors is not None
    first = next(iter(errors))  # later blocks get other inputs
    output, target = (block_outputs(m, [first], samples_of(llama)[-1:]) for m in (untuned, model))
    assert errors[first][0] == pytest.approx(error(output[first], target[first]), rel=1e-3)


def changed(tuned, untuned):
    """The tensors whose values differ."""
    a, b = (load_file(folder / "model.safetensors") for folder in (tuned, untuned))
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape)
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize(
    "architecture", ["llama-biased", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
def test_scales_norms_and_biases_change_and_nothing_else_does(architecture, scaled, tmp_path):
    source = save_model_with_tokenizer(architecture, tmp_path / "model", "bfloat16")
    run(source, tmp_path / "tuned")
    run(source, tmp_path / "untuned", None)
    found = changed(tmp_path / "tuned", tmp_path / "untuned")
    stored = load_file(tmp_path / "tuned" / "model.safetensors")
    blocks = find_blocks(dense(source))
    # experts get no scales, and a router's buffer is no parameter
    fixed = (".experts.", "e_score_correction_bias")
    vectors = {
        name
        for name, tensor in stored.items()
        if tensor.dim() == 1
        and tensor.numel()  # the guard is empty
        and name.startswith(blocks)
        and not any(part in name for part in fixed)
    }
    assert found <= vectors
    # a block whose error did not fall stays as it was
    assert {name for name in found if name.startswith(blocks[0])} == {
        name for name in vectors if name.startswith(blocks[0])
    }
    assert any(name.startswith(blocks[1]) for name in found)


def test_a_block_that_did_not_become_better_stays_as_it_was_quantized(
    llama, scaled, tmp_path, monkeypatch
):
    def ruined(self, packed, *scales):
        tensors = {**packed.tensors, "rows": -1e3 * packed.tensors["rows"]}
        return PackedWeight("scaled", 1, packed.shape, tensors)

    run(llama, tmp_path / "untuned", None)
    runs = {"diverged": run(llama, tmp_path / "diverged", TuningConfig(1, 1e30, batch_size=2))}
    monkeypatch.setattr(scaled.Scaled, "rescaled", ruined)
    runs["ruined"] = run(llama, tmp_path / "ruined")
    for name, result in runs.items():
        assert not changed(tmp_path / name, tmp_path / "untuned")
        assert result.tuning_errors is not None
        assert all(before == after for before, after in result.tuning_errors.values())
