"""A whole model through calibration and the plugin: quantized, loaded, trained through, merged."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from modulora_core.adapters import LoRASettings, add_lora
from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoint import load_model, open_checkpoint
from modulora_core.merge import merge
from modulora_core.quantize import quantize

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a tiny Llama with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 130, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
    vocabulary = {chr(i): i for i in range(128)} | {"<unk>": 128}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return folder


def quantized(dense, out, bits, **options):
    calibration = CalibrationConfig("pydoc[:2%]", samples=8, seq_len=32)
    quantize(str(dense), out, "quip-sharp-e8", {"bits": bits, **options}, calibration=calibration)
    return out


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_packed_model_gives_the_logits_of_its_merged_weights(dense, bits, tmp_path):
    out = quantized(dense, tmp_path / "out", bits)
    merge(str(out), tmp_path / "merged", dtype="float32")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(logits(load_model(out, device="cpu")), expected, rtol=1e-4, atol=1e-4)


def test_more_bits_are_closer_to_the_dense_model(dense, tmp_path):
    expected = logits(AutoModelForCausalLM.from_pretrained(dense))
    errors = []
    for bits in (2, 3, 4):
        out = quantized(dense, tmp_path / str(bits), bits)
        errors.append(float((logits(load_model(out, device="cpu")) - expected).norm() / expected.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 2  # with 2 bits this model, of random weights, has lost all it could


def test_the_same_request_gives_the_same_bytes(dense, tmp_path):
    files = []
    for name in ("one", "two"):
        out = quantized(dense, tmp_path / name, 3)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_width_is_codes_and_vectors_and_nothing_else(dense, bits, tmp_path):
    record = open_checkpoint(quantized(dense, tmp_path / "out", bits)).record
    for _, site in record.items():
        out_features, in_features = site.layout.shape
        assert (
            site.layout.nbytes
            == out_features * in_features * bits // 8 + 2 * (out_features + in_features) + 4
        )


def test_an_adapter_trains_on_it(dense, tmp_path):
    model = load_model(quantized(dense, tmp_path / "out", 3), device="cpu")
    add_lora(model, LoRASettings(rank=4))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
