"""Every family with another kind of linear weight: quantized, loaded, differentiated, merged.

The oracle is the dense model with the quantizer's values in its linear weights.
"""

import torch
from transformers import AutoModelForCausalLM

from modulora_core.checkpoints.opening import open_packed
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.models.sites import find_sites
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.tiny_models import EVERY_ARCHITECTURE, save_tiny_model

IDS = torch.tensor([[5, 17, 3, 80, 42, 9, 11], [7, 2, 2, 31, 60, 4, 90]])


def oracle(folder, toy):
    """The dense model with rounded weights. It multiplies stacks expert by expert."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        for site in find_sites(model).linears:
            parameter = model.get_parameter(site.name)
            for matrix in parameter if site.experts else parameter[None]:
                oriented = matrix.t() if site.transposed else matrix
                packed = toy.Toy().pack(oriented.clone())
                values = toy.Toy().dequantize_tile(packed, (0, len(oriented)), torch.float32)
                matrix.copy_(values.t() if site.transposed else values)
    return model


def logits_and_gradient(model):
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    logits.float().square().sum().backward()
    return logits.detach(), embeddings.grad


@EVERY_ARCHITECTURE
def test_a_packed_and_a_merged_model_are_the_dense_model_with_rounded_weights(
    architecture, toy, tmp_path
):
    source = save_tiny_model(architecture, tmp_path / "source")
    result = quantize(str(source), tmp_path / "packed", "toy", max_shard_bytes=20_000)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    dense = oracle(source, toy)
    linears = {site.name for site in find_sites(dense).linears}
    assert open_packed(tmp_path / "packed").record.weights.keys() == linears
    kept = {name for names in result.kept.values() for name in names}
    assert dict(dense.named_parameters()).keys() <= linears | kept

    packed = load_model(tmp_path / "packed", device="cpu")
    assert linears.isdisjoint(name for name, _ in packed.named_parameters())
    logits, gradient = logits_and_gradient(packed)
    expected_logits, expected_gradient = logits_and_gradient(dense)
    # the order of fp32 sums over two layers of width 32
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * scale)

    merge(str(tmp_path / "packed"), tmp_path / "merged", dtype="float32")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name]), name


def test_a_packed_mixture_of_experts_generates(toy, tmp_path):
    source = save_tiny_model("qwen3_moe", tmp_path / "source")
    quantize(str(source), tmp_path / "packed", "toy")
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    models = load_model(tmp_path / "packed", device="cpu"), oracle(source, toy)
    tokens, expected = (model.generate(IDS[:1], **asked) for model in models)
    assert torch.equal(tokens, expected)
