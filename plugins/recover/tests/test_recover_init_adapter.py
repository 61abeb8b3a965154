"""An adapter of QERA's closed form: the best of its rank, for any quantizer, as PEFT reads it."""

import json

import pytest
import torch
from modulora_recover import init_adapter as module
from modulora_recover.init_adapter import best_correction, init_adapter
from transformers import AutoModelForCausalLM

from modulora_core.calibration import CalibrationConfig
from modulora_core.cli import main
from modulora_core.errors import OptionError, OutputError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.peft_format import read_adapter
from modulora_core.lora.settings import LoRASettings
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.tests.scaled_quantizer import save_model_with_tokenizer
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = CalibrationConfig("pydoc[:2%]", samples=8, seq_len=32)


def output_error(residual, H):
    """E ‖R x‖²."""
    return torch.einsum("oi,ij,oj->", residual, H, residual)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (6, 40)])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_correction_is_the_best_of_its_rank(toy, shape, rank, monkeypatch):
    """Against a whole SVD in float64 with the symmetric root of H, as in the paper."""
    monkeypatch.setattr(module, "DAMPING", 0.0)
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(100, shape[1]) * torch.logspace(-1, 1, shape[1])
    quantizer = Choice("toy").create()
    packed = quantizer.pack(weight)
    H = x.double().t() @ x.double() / 100
    B, A = best_correction(weight, quantizer, packed, H.float(), rank=rank)
    assert (B.shape, A.shape) == ((shape[0], rank), (rank, shape[1]))
    residual = (weight - quantizer.dequantize_tile(packed, (0, shape[0]), torch.float32)).double()
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.sqrt() @ vectors.t()
    U, S, Vt = torch.linalg.svd(residual @ root, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vt[:rank] @ torch.linalg.inv(root)
    found = output_error(residual - (B @ A).double(), H)
    assert found < 1.002 * output_error(residual - best, H)
    assert found < 0.99 * output_error(residual, H)
    torch.testing.assert_close(
        B.square().sum(0).sqrt().double(), S[:rank].sqrt(), rtol=0.02, atol=0
    )


@pytest.mark.parametrize(("rank", "left"), [(4, 0.9), (32, 1e-4)])
def test_it_brings_the_model_nearer_and_finetune_continues_it(
    dense, tunable, text, tmp_path, rank, left
):
    """Rank 32 corrects all of each layer; keys and values have 16 outputs alone."""
    result = init_adapter(
        tunable, tmp_path / "start", dense=dense, calibration=TEXT,
        settings=LoRASettings(rank=rank, alpha=6.0),
    )  # fmt: skip
    assert result.layers == result.corrected == len(read_adapter(tmp_path / "start").deltas)
    teacher = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(1))

    def distance(model):
        with torch.no_grad():
            return float((model(ids).logits - teacher(ids).logits).square().mean())

    model = load_model(tunable)
    before = distance(model)
    load_adapter(model, tmp_path / "start")
    assert distance(model) < left * before
    config = FinetuneConfig.build(
        {"model": str(tunable), "out": str(tmp_path / "out"), "data": str(text), "steps": 1,
         "adapter": str(tmp_path / "start"), "seq_len": 32, "baseline": False, "dropout": 0}
    )  # fmt: skip
    finetune(config)


def test_the_command_gives_the_same_bytes(dense, tunable, tmp_path, capsys):
    init_adapter(tunable, tmp_path / "a", dense=dense, calibration=TEXT)
    words = ["init-adapter", str(tunable), str(tmp_path / "b"), "--dense", str(dense)]
    words += ["--calibration", "pydoc[:2%]", "--samples", "8", "--seq-len", "32", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == found["corrected"] > 0
    a, b = (tmp_path / name / "adapter_model.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_other_layers_are_corrected_and_experts_begin_at_zero(toy, tmp_path, architecture):
    dense = save_model_with_tokenizer(architecture, tmp_path / "dense")
    quantize(str(dense), tmp_path / "packed", "toy")
    result = init_adapter(
        tmp_path / "packed", tmp_path / "start", dense=dense, calibration=TEXT,
        settings=LoRASettings(rank=2),
    )  # fmt: skip
    deltas = read_adapter(tmp_path / "start").deltas
    zero = {name for name, delta in deltas.items() if not delta.B.any()}
    assert result.layers == len(deltas)
    assert result.corrected == len(deltas) - len(zero)
    assert all("experts" in name for name in zero)
    assert bool(zero) == (architecture == "mixtral")


def test_another_dense_model_and_a_used_folder_are_refused(dense, tunable, tmp_path, toy):
    other = save_model_with_tokenizer("llama", tmp_path / "other")
    with pytest.raises(OptionError, match=r"^dense .*quantized from, with model\.layers"):
        init_adapter(tunable, tmp_path / "out", dense=other, calibration=TEXT)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError):
        init_adapter(tunable, dense, dense=dense, calibration=TEXT)
