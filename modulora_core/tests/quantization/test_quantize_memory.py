"""Peak memory of quantizing does not grow with the number of layers, with calibration or not."""

from dataclasses import replace

import pytest
import torch
from modulora_conformance.allocations import Allocations
from transformers import AutoModelForCausalLM, LlamaConfig

from modulora_core.calibration import CalibrationConfig
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.tiny_tokenizer import make_tokenizer
from modulora_core.tests.width_quantizer import installed

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 600}
TEXT = CalibrationConfig("pydoc[:5%]", samples=4, seq_len=16, batch_size=2, weighting="none")
WEIGHTED = replace(TEXT, weighting="loss")
TOKENS, MATRICES, OUTPUTS = 4 * 16, 7, 5 * 96 + 2 * 256
"""Of the text; in a layer; of all matrices in a layer."""


@pytest.mark.parametrize(
    ("quantizer", "calibration", "kept"),
    [
        ("plain", None, 0),
        ("heeding", TEXT, 0),
        ("heeding", WEIGHTED, 4 * (MATRICES * TOKENS + OUTPUTS)),  # token weights, E[g²]
    ],
)
def test_the_peak_does_not_grow_with_the_number_of_layers(quantizer, calibration, kept, tmp_path):
    """But for ``kept`` bytes of a layer."""
    peaks = []
    with installed(tmp_path / "site"):
        for layers in (2, 8):
            folder = tmp_path / str(layers)
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=layers))
            model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="300kB")
            make_tokenizer().save_pretrained(folder)
            assert len(list(folder.glob("*.safetensors"))) >= layers
            with Allocations() as allocations:
                quantize(
                    str(folder), tmp_path / f"{layers}-packed", quantizer,
                    calibration=calibration, max_shard_bytes=200_000,
                )  # fmt: skip
            peaks.append(allocations.peak)
    # nothing else stays of the additional layers, not even one norm in bfloat16
    assert peaks[1] - peaks[0] - (8 - 2) * kept < 96 * 2
