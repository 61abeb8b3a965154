"""A model with a packed head or embedding is the dense model with rounded tables, exactly."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, OptionError, RequestError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.layers import QuantLinear, TiedHead
from modulora_core.models.ends import find_ends
from modulora_core.models.sites import find_sites
from modulora_core.packed_parameters import PackedTable
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.tiny_models import save_tiny_model, tiny_model
from modulora_core.tests.width_quantizer import installed

IDS = torch.tensor([[5, 17, 3, 80, 42, 9, 95], [7, 2, 2, 0, 60, 4, 90]])
TOY = Choice("toy")
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAMILIES = {  # name → the embedding's and the head's weight; None if the head is tied
    "llama": (TABLE, HEAD),
    "llama-tied": (TABLE, None),
    "phi": (TABLE, HEAD),  # the head has a bias
    "gpt2": ("transformer.wte.weight", None),
    "opt": ("model.decoder.embed_tokens.weight", None),  # narrower than the blocks
    "gemma3_text": (TABLE, None),  # scales the rows
    "gpt_neox": ("gpt_neox.embed_in.weight", HEAD),
}


def packed(family, folder, quantizer="toy", **options):
    """The packed folder; the dense one is beside it, in ``source``."""
    save_tiny_model(family, folder / "source")
    quantize(str(folder / "source"), folder / "packed", quantizer, **options)
    return folder / "packed"


def round_(weight, quantizer):
    with torch.no_grad():
        weights = quantizer.pack(weight.clone())
        weight.copy_(quantizer.dequantize_tile(weights, (0, len(weight)), torch.float32))


def oracle(folder, toy, *ends):
    """The dense model with rounded linear weights and ends."""
    model = AutoModelForCausalLM.from_pretrained(folder / "source").eval()
    sites = {site.name: site.transposed for site in find_sites(model).linears}
    for name, transposed in (sites | dict.fromkeys(filter(None, ends), False)).items():
        weight = model.get_parameter(name)
        round_(weight.t() if transposed else weight, toy.Toy())
    return model


def outputs(model):
    """Logits, and the hidden states before the first block."""
    with torch.no_grad():
        found = model(IDS, output_hidden_states=True)
    return found.logits, found.hidden_states[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_ends_are_the_rounded_ones(family, toy, tmp_path):
    embedding, head = FAMILIES[family]
    folder = packed(family, tmp_path, head=TOY, embeddings=TOY, max_shard_bytes=20_000)
    record = open_packed(folder).record
    assert [name for name, site in record.items() if site.kind == "embedding"] == [embedding]
    assert (head in record.weights) == (head is not None)

    model, dense = load_model(folder, device="cpu"), oracle(tmp_path, toy, embedding, head)
    assert isinstance(model.get_input_embeddings().weight, PackedTable)
    assert isinstance(model.get_output_embeddings(), QuantLinear if head else TiedHead)
    (logits, first), (expected_logits, expected_first) = outputs(model), outputs(dense)
    assert torch.equal(first, expected_first)  # a lookup rounds nothing
    # the order of fp32 sums over two layers of width 32
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)

    merge(str(folder), tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in dense.state_dict().items())
    half = load_model(folder, device="cpu", dtype="bfloat16")
    assert half.dtype == half.base_model.dtype == torch.bfloat16, "the scales are float32"


@pytest.mark.parametrize("end", ["head", "embeddings"])
def test_the_table_of_a_tied_model_is_stored_once(end, toy, tmp_path):
    checkpoint = open_packed(packed("llama-tied", tmp_path, **{end: TOY}))
    assert not any(name.startswith("lm_head") for name in checkpoint.tensors())
    model = load_model(checkpoint, device="cpu")
    model.tie_weights()  # as transformers and accelerate call it here and there
    assert model.lm_head.packed_weight is model.model.embed_tokens.weight
    names = [name for name in model.state_dict() if "codes" in name and "layers" not in name]
    assert names == [f"{TABLE}.codes"]
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    assert model.to(torch.bfloat16).lm_head(x).dtype == torch.bfloat16


def test_two_choices_for_one_tied_table_are_refused_before_work(toy, tmp_path):
    with pytest.raises(RequestError, match="one choice, got toy"):
        packed("llama-tied", tmp_path, head=TOY, embeddings=Choice("verbatim"))
    assert not list(tmp_path.glob("packed*"))


def test_an_unusual_end_is_refused(toy):
    model = tiny_model("llama")
    stored = dict(model.named_parameters())
    model.lm_head = nn.Sequential(model.lm_head)
    message = r"--quantize-head: .*, and LlamaForCausalLM has lm_head \(Sequential\)"
    with pytest.raises(OptionError, match=message):
        find_ends(model, TOY, None, stored)
    with pytest.raises(OptionError, match="it is shared with another parameter"):
        find_ends(model, None, TOY, ())
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(OptionError, match="--quantize-embeddings: expected an input embedding"):
        find_ends(model, None, TOY, stored)


def test_ends_are_packed_without_calibration_beside_calibrated_blocks(tmp_path):
    save_llama_with_tokenizer(tmp_path / "source")
    text, end = CalibrationConfig("pydoc[:5%]", samples=2, seq_len=16), Choice("plain", {"bits": 8})
    words = (str(tmp_path / "source"), tmp_path / "out", "heeding")
    with installed(tmp_path / "site"):
        with pytest.raises(OptionError, match="--quantize-head heeding: it needs calibration"):
            quantize(*words, calibration=text, head=Choice("heeding"))
        quantize(*words, calibration=text, head=end, embeddings=end)
        record = open_packed(tmp_path / "out").record
        packed_by = {name: record.recipes[site.recipe].quantizer for name, site in record.items()}
        assert [packed_by.pop(HEAD), packed_by.pop(TABLE)] == ["plain", "plain"]
        assert set(packed_by.values()) == {"heeding"}
        assert len(record.recipes) == 2, "one recipe for both ends"
        assert torch.isfinite(load_model(tmp_path / "out", device="cpu")(IDS).logits).all()


def test_a_record_whose_table_is_no_embedding_is_refused(toy, tmp_path):
    config = packed("llama", tmp_path, head=TOY) / "config.json"
    values = json.loads(config.read_text())
    record = values["quantization_config"]
    record["sites"][record["weights"][HEAD]]["kind"] = "embedding"
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"lm_head: .* expected nn.Embedding, got Linear"):
        load_model(config.parent, device="cpu")
