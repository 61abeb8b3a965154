"""Packed heads and embeddings: the model is the dense one with the rounded tables, exactly; what is stored, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modulora_core.adapters.lora import LoRASettings, add_lora
from modulora_core.adapters.merge import merge
from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.errors import AdapterError, CheckpointError, OptionError, RequestError
from modulora_core.layers import LoRALinear, PackedTable, QuantLinear, TiedHead
from modulora_core.models.ends import find_ends
from modulora_core.models.sites import find_sites
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.tiny_models import save_tiny_model, tiny_model
from modulora_core.tests.width_quantizer import installed

IDS = torch.tensor([[5, 17, 3, 80, 42, 9, 95], [7, 2, 2, 0, 60, 4, 90]])
TOY = Choice("toy")
FAMILIES = {  # name → the embedding's and the head's weight; None where the head is tied
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "llama-tied": ("model.embed_tokens.weight", None),
    "phi": ("model.embed_tokens.weight", "lm_head.weight"),  # the head has a bias
    "gpt2": ("transformer.wte.weight", None),
    "opt": ("model.decoder.embed_tokens.weight", None),  # the embedding is narrower than the blocks
    "gemma3_text": ("model.embed_tokens.weight", None),  # scales what it looks up
    "gpt_neox": ("gpt_neox.embed_in.weight", "lm_head.weight"),
}


def oracle(folder: Path, toy: ModuleType, *ends: str | None) -> PreTrainedModel:
    """The dense model with rounded linear weights and ends."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    quantizer = toy.Toy()
    sites = {site.name: site.transposed for site in find_sites(model).linears}
    with torch.no_grad():
        for name, transposed in (sites | dict.fromkeys(filter(None, ends), False)).items():
            weight = model.get_parameter(name)
            matrix = weight.t() if transposed else weight
            matrix.copy_(
                quantizer.dequantize_tile(
                    quantizer.pack(matrix.clone()), (0, len(matrix)), torch.float32
                )
            )
    return model


def outputs(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the hidden states before the first block."""
    with torch.no_grad():
        found = model(IDS, output_hidden_states=True)
    return found.logits, found.hidden_states[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_packed_ends_is_the_dense_model_with_rounded_ones(
    family: str, toy: ModuleType, tmp_path: Path
) -> None:
    embedding, head = FAMILIES[family]
    source = save_tiny_model(family, tmp_path / "source")
    quantize(
        str(source), tmp_path / "packed", "toy", head=TOY, embeddings=TOY, max_shard_bytes=20_000
    )
    record = open_checkpoint(tmp_path / "packed").record
    assert {name for name, site in record.items() if site.kind == "embedding"} == {embedding}
    assert (head in record.weights) == (head is not None)

    packed = load_model(tmp_path / "packed", device="cpu")
    assert isinstance(packed.get_input_embeddings().weight, PackedTable)
    assert isinstance(packed.get_output_embeddings(), QuantLinear if head else TiedHead)
    logits, first = outputs(packed)
    dense = oracle(source, toy, embedding, head)
    expected_logits, expected_first = outputs(dense)
    assert torch.equal(first, expected_first)  # looked up, which rounds nothing
    # the order of fp32 sums over two layers of width 32
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)

    merge(str(tmp_path / "packed"), tmp_path / "merged", dtype="float32")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name]), name


@pytest.mark.parametrize("chosen", ["head", "embeddings"])
def test_each_end_is_packed_alone(chosen: str, toy: ModuleType, tmp_path: Path) -> None:
    source = save_tiny_model("llama", tmp_path / "source")
    quantize(str(source), tmp_path / "packed", "verbatim", **{chosen: Choice("toy", {"levels": 9})})
    record = open_checkpoint(tmp_path / "packed").record
    name = {"head": "lm_head.weight", "embeddings": "model.embed_tokens.weight"}[chosen]
    recipe = record.recipes[record.sites[record.weights[name]].recipe]
    assert (recipe.quantizer, recipe.options) == ("toy", {"levels": 9})
    kept = {name for names in record.kept.values() for name in names}
    assert kept & {"lm_head.weight", "model.embed_tokens.weight"} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    } - {name}
    quantizer = toy.Toy(toy.ToyOptions(levels=9))
    dense = AutoModelForCausalLM.from_pretrained(source)
    weight = dense.get_parameter(name)
    with torch.no_grad():
        weight.copy_(
            quantizer.dequantize_tile(
                quantizer.pack(weight.clone()), (0, len(weight)), torch.float32
            )
        )
    logits, _ = outputs(load_model(tmp_path / "packed", device="cpu"))
    torch.testing.assert_close(logits, outputs(dense)[0], rtol=1e-4, atol=1e-4)  # as above


@pytest.mark.parametrize("option", [{"head": TOY}, {"embeddings": TOY}])
def test_the_table_of_a_tied_model_is_stored_once(
    option: dict[str, Any], toy: ModuleType, tmp_path: Path
) -> None:
    source = save_tiny_model("llama-tied", tmp_path / "source")
    quantize(str(source), tmp_path / "packed", "toy", **option)
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert not any(name.startswith("lm_head") for name in checkpoint.tensors())
    model = load_model(checkpoint, device="cpu")
    table = model.model.embed_tokens.weight
    assert model.lm_head.weight is table
    model.tie_weights()  # as transformers and accelerate call it here and there
    assert model.lm_head.weight is table
    assert [name for name in model.state_dict() if "codes" in name and "layers" not in name] == [
        "model.embed_tokens.weight.codes"
    ]
    assert (
        model.to(torch.bfloat16).lm_head(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype
        == torch.bfloat16
    )


def test_lookups_follow_the_dtype_of_the_model(toy: ModuleType, tmp_path: Path) -> None:
    source = save_tiny_model("llama", tmp_path / "source")
    quantize(str(source), tmp_path / "packed", "toy", embeddings=TOY)
    model = load_model(tmp_path / "packed", dtype="bfloat16", device="cpu")
    embed = model.get_input_embeddings()
    half = embed(IDS)
    assert half.dtype == torch.bfloat16
    assert embed.weight.scale.dtype == torch.float32, "packed tensors keep their own"
    whole = embed.float()(IDS)
    assert torch.equal(whole.bfloat16(), half)
    with pytest.raises(IndexError, match="expected 0 to 95, got 3 to 96"):
        embed(torch.tensor([3, 96]))


def test_adapters_leave_the_ends_alone_unless_an_untied_head_is_named(
    toy: ModuleType, tmp_path: Path
) -> None:
    for family in ("llama", "llama-tied"):
        source = save_tiny_model(family, tmp_path / family)
        quantize(str(source), tmp_path / f"{family}-packed", "toy", head=TOY, embeddings=TOY)
    model = load_model(tmp_path / "llama-packed", device="cpu")
    assert len(add_lora(model, LoRASettings(rank=2))) == 14
    assert type(model.lm_head) is QuantLinear
    assert add_lora(model, LoRASettings(rank=2, targets="lm_head"), name="other") == ["lm_head"]
    assert isinstance(model.lm_head, LoRALinear)
    tied = load_model(tmp_path / "llama-tied-packed", device="cpu")
    with pytest.raises(AdapterError, match="lm_head is no packed linear layer"):
        add_lora(tied, LoRASettings(rank=2, targets="lm_head"))


def test_the_gradients_of_an_adapter_are_those_on_the_dense_model(
    toy: ModuleType, tmp_path: Path
) -> None:
    source = save_tiny_model("llama-tied", tmp_path / "source")
    quantize(str(source), tmp_path / "packed", "toy", embeddings=TOY)
    model = load_model(tmp_path / "packed", device="cpu")
    add_lora(model, LoRASettings(rank=2, dropout=0.0, targets="down_proj"))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    layer = model.model.layers[0].mlp.down_proj
    dense = oracle(source, toy, "model.embed_tokens.weight")
    weight = dense.model.layers[0].mlp.down_proj.weight
    dense(IDS, labels=IDS).loss.backward()
    A, scale = layer.lora_A["default"].detach(), layer.scale["default"]
    # dB = s · dW Aᵀ while B is zero; the order of fp32 sums
    torch.testing.assert_close(
        layer.lora_B["default"].grad, scale * weight.grad @ A.t(), rtol=1e-3, atol=1e-5
    )


def test_a_compiled_model_looks_up_the_same_rows(toy: ModuleType) -> None:
    quantizer = toy.Toy()
    embedding = nn.Embedding(11, 7)
    table = PackedTable(quantizer, quantizer.pack(embedding.weight.detach()), torch.float32)
    del embedding._parameters["weight"]
    embedding.add_module("weight", table)
    ids = torch.tensor([[3, 3, 10], [0, 1, 2]])
    compiled = torch.compile(lambda ids: embedding(ids) * 2, backend="eager")
    assert torch.equal(compiled(ids), embedding(ids) * 2)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "request_", "message"),
    [
        (
            "llama-tied",
            {"head": TOY, "embeddings": Choice("verbatim")},
            "are one table; expected one choice, got toy",
        ),
        ("llama", {"head": Choice("nobody")}, "nobody"),
        ("llama", {"embeddings": Choice("toy", {"levels": 1000})}, "levels"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_work(
    family: str, request_: dict[str, Any], message: str, toy: ModuleType, tmp_path: Path
) -> None:
    source = save_tiny_model(family, tmp_path / "source")
    with pytest.raises(RequestError, match=message):
        quantize(str(source), tmp_path / "out", "toy", **request_)
    assert not list(tmp_path.glob("out*"))


def test_an_end_that_is_something_else_is_refused(toy: ModuleType) -> None:
    model = tiny_model("llama")
    stored = dict(model.named_parameters())
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(
        OptionError, match=r"--quantize-head: .*, and LlamaForCausalLM has lm_head \(Sequential\)"
    ):
        find_ends(model, TOY, None, stored)
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(OptionError, match="--quantize-embeddings: expected an input embedding"):
        find_ends(model, None, TOY, stored)


def test_a_checkpoint_whose_table_is_no_embedding_is_refused(
    toy: ModuleType, tmp_path: Path
) -> None:
    source = save_tiny_model("llama", tmp_path / "source")
    quantize(str(source), tmp_path / "packed", "toy", head=TOY)
    config = tmp_path / "packed" / "config.json"
    text = config.read_text()
    index = open_checkpoint(tmp_path / "packed").record.weights["lm_head.weight"]
    values = json.loads(text)
    values["quantization_config"]["sites"][index]["kind"] = "embedding"
    config.write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError,
        match=r"lm_head: packed as an input embedding: expected nn.Embedding, got Linear",
    ):
        load_model(tmp_path / "packed", device="cpu")


def test_ends_are_packed_without_calibration_beside_blocks_that_have_it(tmp_path: Path) -> None:
    save_llama_with_tokenizer(tmp_path / "source")
    text = CalibrationConfig("pydoc[:5%]", samples=2, seq_len=16)
    with installed(tmp_path / "site"):
        with pytest.raises(OptionError, match="--quantize-head heeding: it needs calibration"):
            quantize(
                str(tmp_path / "source"),
                tmp_path / "out",
                "heeding",
                calibration=text,
                head=Choice("heeding"),
            )
        end = Choice("plain", {"bits": 8})
        quantize(
            str(tmp_path / "source"),
            tmp_path / "out",
            "heeding",
            calibration=text,
            head=end,
            embeddings=end,
        )
        record = open_checkpoint(tmp_path / "out").record
        packed_by = {name: record.recipes[site.recipe].quantizer for name, site in record.items()}
        assert (
            packed_by.pop("lm_head.weight") == packed_by.pop("model.embed_tokens.weight") == "plain"
        )
        assert set(packed_by.values()) == {"heeding"}
        assert len(record.recipes) == 2, "one recipe for both ends"
        assert torch.isfinite(load_model(tmp_path / "out", device="cpu")(IDS).logits).all()
