"""A whole model through calibration and the plugin."""

from __future__ import annotations

import pytest
import torch
from modulora_conformance.tiny_model import logits_of, quantized_again, tiny_model
from modulora_qtip.quantizer import QTIP
from modulora_qtip.reference import Options
from transformers import AutoModelForCausalLM

from modulora_core.adapters.merge import merge
from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

BITS = (2, 3, 4)


def quantizer(bits):
    return QTIP(Options(bits=bits, states=10))


def packed_logits(folder):
    return logits_of(load_model(folder, device="cpu"))


def test_a_packed_model_gives_the_logits_of_its_merged_weights(tmp_path):
    packed = tiny_model(quantizer(3)).packed
    merge(str(packed), tmp_path / "merged", dtype="float32")
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(packed_logits(packed), expected, rtol=1e-4, atol=1e-4)


def test_more_bits_are_closer_to_the_dense_model():
    models = [tiny_model(quantizer(bits)) for bits in BITS]
    expected = logits_of(AutoModelForCausalLM.from_pretrained(models[0].dense))
    errors = [float((packed_logits(model.packed) - expected).norm()) for model in models]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 2


def test_the_same_request_gives_the_same_bytes(tmp_path):
    folders = tiny_model(quantizer(3)).packed, quantized_again(quantizer(3), tmp_path / "again")
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_stores_walks_and_vectors_alone(bits):
    record = open_checkpoint(tiny_model(quantizer(bits)).packed).record
    for _, site in record.items():
        out, columns = site.layout.shape
        tiles = -(-out // 16) * -(-columns // 16)
        assert site.layout.nbytes == tiles * 32 * bits + 2 * (out + columns) + 4
