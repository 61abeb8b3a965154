"""Every family of transformers that has another kind of linear weight: quantized, loaded, differentiated, merged.

The oracle is the dense model whose linear weights were replaced by what the quantizer gives back for them.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from modulora_core.adapters.merge import merge
from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.models.sites import find_sites
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.tiny_models import ARCHITECTURES, save_tiny_model

IDS = torch.tensor([[5, 17, 3, 80, 42, 9, 11], [7, 2, 2, 31, 60, 4, 90]])


def rounded(weight: Tensor, toy: ModuleType, transposed: bool) -> Tensor:
    matrix = weight.t() if transposed else weight
    packed = toy.Toy().pack(matrix)
    back = toy.Toy().dequantize_tile(packed, (0, matrix.shape[0]), torch.float32)
    return back.t() if transposed else back


def oracle(folder: Path, toy: ModuleType) -> PreTrainedModel:
    """The dense model with rounded weights. Stacks are multiplied expert by expert, as packed ones are."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        for site in find_sites(model).linears:
            parameter = model.get_parameter(site.name)
            stack = parameter if site.experts else parameter[None]
            for matrix in stack:
                matrix.copy_(rounded(matrix.clone(), toy, site.transposed))
    return model


def logits_and_gradient(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    logits.float().square().sum().backward()
    assert embeddings.grad is not None
    return logits.detach(), embeddings.grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_model_is_the_dense_model_with_rounded_weights(
    architecture: str, toy: ModuleType, tmp_path: Path
) -> None:
    source = save_tiny_model(architecture, tmp_path / "source")
    result = quantize(str(source), tmp_path / "packed", "toy", max_shard_bytes=20_000)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    dense = oracle(source, toy)
    expected = {site.name for site in find_sites(dense).linears}
    assert set(open_checkpoint(tmp_path / "packed").record.weights) == expected
    assert set(dict(dense.named_parameters())) <= expected | {
        n for names in result.kept.values() for n in names
    }

    packed = load_model(tmp_path / "packed", device="cpu")
    assert not any(
        isinstance(p, torch.nn.Parameter) and name in expected
        for name, p in packed.named_parameters()
    )
    logits, gradient = logits_and_gradient(packed)
    expected_logits, expected_gradient = logits_and_gradient(dense)
    # the order of fp32 sums over two layers of width 32
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_model_loads_in_plain_transformers(
    architecture: str, toy: ModuleType, tmp_path: Path
) -> None:
    source = save_tiny_model(architecture, tmp_path / "source")
    quantize(str(source), tmp_path / "packed", "toy")
    merge(str(tmp_path / "packed"), tmp_path / "merged", dtype="float32")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    dense = oracle(source, toy).state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, dense[name]), name


def test_generating_with_a_packed_mixture_of_experts(toy: ModuleType, tmp_path: Path) -> None:
    source = save_tiny_model("qwen3_moe", tmp_path / "source")
    quantize(str(source), tmp_path / "packed", "toy")
    model = load_model(tmp_path / "packed", device="cpu")
    with torch.no_grad():
        tokens = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=None)
        again = oracle(source, toy).generate(
            IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=None
        )
    assert tokens.tolist() == again.tolist()
