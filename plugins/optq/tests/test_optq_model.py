"""A whole model through calibration and the plugin. The kit compares losses and gradients of such a model with its dense twin's."""

from __future__ import annotations

import pytest
import torch
from modulora_conformance.tiny_model import logits_of, quantized_again, tiny_model
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ
from transformers import AutoModelForCausalLM

from modulora_core.adapters.merge import merge
from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

GROUP = 16


def quantizer(bits, **options):
    return OPTQ(Options(bits=bits, group_size=GROUP, **options))


def packed_logits(folder):
    return logits_of(load_model(folder, device="cpu"))


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_packed_model_gives_the_logits_of_its_merged_weights(bits, static_groups, tmp_path):
    packed = tiny_model(quantizer(bits, static_groups=static_groups)).packed
    merge(str(packed), tmp_path / "merged", dtype="float32")
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(packed_logits(packed), expected, rtol=1e-4, atol=1e-4)


def test_more_bits_are_closer_to_the_dense_model():
    models = [tiny_model(quantizer(bits)) for bits in (2, 3, 4, 8)]
    expected = logits_of(AutoModelForCausalLM.from_pretrained(models[0].dense))
    errors = [float((packed_logits(model.packed) - expected).norm()) for model in models]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[2] / 8  # four bits more make steps of a sixteenth


def test_the_same_request_gives_the_same_bytes(tmp_path):
    folders = tiny_model(quantizer(3)).packed, quantized_again(quantizer(3), tmp_path / "again")
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two


def test_three_bits_are_three_bits_and_their_scales():
    record = open_checkpoint(tiny_model(quantizer(3)).packed).record
    # of 3-bit codes and zero points a row has a plane of two bits and one of one bit, each in whole bytes
    for _, site in record.items():
        out_features, in_features = site.layout.shape
        groups = in_features // GROUP
        assert site.layout.nbytes == out_features * (
            in_features * 3 // 8 + 2 * groups + -(-groups // 4) + -(-groups // 8)
        )
