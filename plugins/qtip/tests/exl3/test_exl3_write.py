"""Folders of the layout ``exl3`` are written tensor by tensor; others are refused by name."""

import json

import pytest
import torch
from exl3_folders import alike, mixed, save_exl3
from exl3_tensors import MULTIPLIERS, weight
from modulora_convert.convert import convert
from modulora_qtip.formats.exl3 import EXL3
from modulora_qtip.quantizer import QTIP
from modulora_qtip.reference import Options
from safetensors.torch import load_file

from modulora_core.cli import main
from modulora_core.errors import ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.models import installed_formats
from modulora_core.models.formats import StoredWeight
from modulora_core.spec import Calibration, TensorLayout
from modulora_core.tests.other_tools import logits


def written(packed):
    """The tensors of a layer as the format writes them, which are as it planned them."""
    writer = installed_formats.create("exl3")
    assert isinstance(writer, EXL3)
    stored = StoredWeight("m", QTIP(), packed.layout, packed.tensors.__getitem__)
    made = writer.tensors(stored)
    assert {name: TensorLayout.of(tensor) for name, tensor in made.items()} == writer.plan(stored)
    return made


@pytest.mark.parametrize(
    ("bits", "code", "limit"),
    [(2, "mcg", 0.29), (1, "3inst", 0.55), (3, "mul1", 0.15), (2.5, "mul1", 0.21)],
)
def test_a_packed_weight_is_what_the_description_reads(bits, code, limit):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(128, 256, generator=generator) * 0.02
    W[:, 5] *= 10  # an outlier, which the rotation spreads
    options = Options.model_validate(
        {"layout": "exl3", "bits": bits, "code": code, "sweeps": 0, "states": 16}
    )
    packed = QTIP(options).pack(W, Calibration(torch.eye(256), 1))
    tensors = written(packed)
    assert set(tensors) == {"trellis", "suh", "svh"} | ({code} & MULTIPLIERS.keys())
    Ŵ = weight(tensors)
    found = QTIP().dequantize_tile(packed, (0, 128), torch.float64)
    torch.testing.assert_close(found, Ŵ, rtol=0, atol=1e-13 * float(Ŵ.abs().max()))
    assert float((W - Ŵ).norm() / W.norm()) < limit


@pytest.mark.parametrize(
    ("choice", "sizes"),
    [
        (mixed, {}),
        (alike(2.5, "mul1"), {}),
        (alike(2, "3inst"), {"vocab_size": 603, "intermediate_size": 200}),
    ],
    ids=["mixed", "halves", "padded"],
)
def test_a_folder_is_written_as_it_was_read(choice, sizes, tmp_path):
    save_exl3(tmp_path / "m", choice=choice, **sizes)
    convert(str(tmp_path / "m"), tmp_path / "ours", "modulora")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "exl3")
    before = load_file(tmp_path / "m" / "model.safetensors")
    after = load_file(tmp_path / "theirs" / "model.safetensors")
    for name in before.keys() & after.keys():
        if not name.endswith(".bias"):  # which loses its padding
            assert torch.equal(after[name], before[name]), name
    missing = {name.rpartition(".")[2] for name in before.keys() - after.keys()}
    assert missing <= {"su", "sv"}  # signs become scales
    expected = logits(load_model(tmp_path / "m", dtype="float32"))
    assert torch.equal(logits(load_model(tmp_path / "theirs", dtype="float32")), expected)
    in_config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    beside = json.loads((tmp_path / "theirs" / "quantization_config.json").read_text())
    assert in_config == beside
    assert in_config["quant_method"] == "exl3"
    assert in_config["head_bits"] == 6
    stored = {
        name: about
        for layer in in_config["tensor_storage"].values()
        for name, about in layer["stored_tensors"].items()
    }
    for name, about in stored.items():
        assert about == {
            "shape": list(after[name].shape), "torch_dtype": str(after[name].dtype)[6:]
        }  # fmt: skip
    assert {name for name in after if name.endswith(("trellis", "bias"))} <= stored.keys()


def test_experts_are_refused(tmp_path):
    save_exl3(tmp_path / "m", "qwen3_moe", alike(2, "mcg"))
    convert(str(tmp_path / "m"), tmp_path / "ours", "modulora")
    with pytest.raises(ModelError, match=r"a stack of 3 experts .* the format exl3 doesn't hold"):
        convert(str(tmp_path / "ours"), tmp_path / "theirs", "exl3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qtip", "-o", "states=10", "-o", "sweeps=0"], "Hadamard matrices of order full"),
        (["nf4"], "packed by nf4; exl3 holds weights of qtip only"),
    ],
)
def test_weights_of_another_layout_are_refused(words, message, dense, tmp_path, refused):
    text = ["--calibration", str(dense / "text.txt"), "--samples", "2", "--seq-len", "32"]
    packed, out = tmp_path / "packed", tmp_path / "theirs"
    calibrated = text if words[0] == "qtip" else []
    assert main(["quantize", str(dense), str(packed), "-q", *words, *calibrated]) == 0
    assert message in refused(["convert", packed, out, "--to", "exl3"])
    assert not out.exists()
