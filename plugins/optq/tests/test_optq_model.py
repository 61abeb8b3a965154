"""A whole model through calibration and the plugin.

The kit compares losses and gradients of such a model with the dense one.
"""

from __future__ import annotations

import pytest
import torch
from modulora_conformance.tiny_model import logits_of, tiny_model
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ
from transformers import AutoModelForCausalLM

from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def quantizer(bits: int, **options: bool) -> OPTQ:
    return OPTQ(Options(bits=bits, group_size=16, **options))


@pytest.mark.parametrize(("bits", "static_groups"), [(3, True), (4, False)])
def test_a_packed_model_gives_the_logits_of_its_merged_weights(bits, static_groups, tmp_path):
    packed = tiny_model(quantizer(bits, static_groups=static_groups)).packed
    merge(str(packed), tmp_path / "merged", dtype="float32")
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    found = logits_of(load_model(packed, device="cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_more_bits_are_closer_to_the_dense_model():
    models = [tiny_model(quantizer(bits)) for bits in (2, 3, 4, 8)]
    expected = logits_of(AutoModelForCausalLM.from_pretrained(models[0].dense))
    found = [logits_of(load_model(model.packed, device="cpu")) for model in models]
    errors = [float((logits - expected).norm()) for logits in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[2] / 8  # four bits more make steps of a sixteenth
