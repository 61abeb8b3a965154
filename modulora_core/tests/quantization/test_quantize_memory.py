"""What quantizing takes doesn't grow with the number of layers: a layer is dense at a time, or with calibration a block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from modulora_core.calibration import CalibrationConfig
from modulora_core.devices.memory import Allocations
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.tiny_tokenizer import make_tokenizer
from modulora_core.tests.width_quantizer import installed

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 600}
FEW, MANY = 2, 8
CALIBRATION = CalibrationConfig("pydoc[:5%]", samples=4, seq_len=16, batch_size=2)


@pytest.fixture(scope="module")
def widths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed(tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same model with few layers and with many, in shards of some layers."""
    folders = {}
    for layers in (FEW, MANY):
        folders[layers] = tmp_path_factory.mktemp("source") / str(layers)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=layers))
        model.to(torch.bfloat16).save_pretrained(folders[layers], max_shard_size="300kB")
        make_tokenizer().save_pretrained(folders[layers])
        assert len(list(folders[layers].glob("*.safetensors"))) >= layers
    return folders


def peak(source: Path, out: Path, quantizer: str, calibration: CalibrationConfig | None) -> int:
    with Allocations() as allocations:
        quantize(
            str(source),
            out,
            quantizer,
            calibration=calibration,
            max_shard_bytes=200_000,
        )
    return allocations.peak


@pytest.mark.parametrize(("quantizer", "calibration"), [("plain", None), ("heeding", CALIBRATION)])
def test_the_peak_does_not_grow_with_the_number_of_layers(
    quantizer: str,
    calibration: CalibrationConfig | None,
    widths: None,
    sources: dict[int, Path],
    tmp_path: Path,
) -> None:
    few, many = (
        peak(source, tmp_path / str(layers), quantizer, calibration)
        for layers, source in sources.items()
    )
    # of the layers that are more nothing stays, not even one norm in bfloat16
    assert many - few < 96 * 2, (few, many)
