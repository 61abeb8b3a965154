"""Scales that are NaN or too large are refused when a weight is loaded, merged or converted."""

import pytest
import torch
from modulora_fp4.quantizer import FP4
from safetensors.torch import load_file, save_file

from modulora_core import load_model, merge, quantize
from modulora_core.errors import CheckpointError
from modulora_core.tests.tiny_models import save_tiny_model

NAMED = r"model\.layers\.1\.self_attn\.q_proj\.weight: expected finite scales"


@pytest.mark.parametrize("type", ["mxfp4", "nvfp4"])
def test_every_code_of_a_scale(type):
    quantizer = FP4(FP4.Options(type=type))
    packed = quantizer.pack(torch.randn(4, 64))
    kind = torch.float8_e8m0fnu if type == "mxfp4" else torch.float8_e4m3fn
    for code in range(256):
        packed.tensors["scales"][2, 1] = code
        value = torch.tensor([code], dtype=torch.uint8).view(kind).to(torch.float32)
        if bool((value <= 2.0**100).all()):  # false for NaN
            quantizer.check_values(packed, "w")
        else:
            with pytest.raises(CheckpointError, match="w: expected finite scales"):
                quantizer.check_values(packed, "w")


@pytest.mark.parametrize("type", ["mxfp4", "nvfp4"])
def test_it_is_refused_by_name(type, tmp_path):
    save_tiny_model("llama", tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "fp4", {"type": type},
             exclude=["*.down_proj"])  # fmt: skip
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_proj.weight.scales"][3, 0] = 255
    save_file(tensors, file, {"format": "pt"})
    file.with_name("SHA256SUMS").unlink()  # the values are checked too
    with pytest.raises(CheckpointError, match=NAMED):
        load_model(tmp_path / "packed", device="cpu")
    with pytest.raises(CheckpointError, match=NAMED):
        merge(str(tmp_path / "packed"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mapped = load_model(tmp_path / "packed", device="cpu", mapped=True)
    with pytest.raises(CheckpointError, match=NAMED):
        mapped(torch.tensor([[1, 2, 3]]))
