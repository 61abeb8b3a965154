"""Scales that are NaN or infinite are refused when a weight is loaded, merged or converted."""

import re

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from modulora_convert.convert import convert
from modulora_gguf import reference
from modulora_gguf.quantizer import check_scales
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf
from safetensors.torch import load_file, save_file

from modulora_core import load_model, merge, quantize
from modulora_core.cli import main
from modulora_core.errors import CheckpointError
from modulora_core.tests.tiny_models import save_tiny_model

SPECIAL = {"MXFP4": (0, 0xFF), "NVFP4": (2, 0x7F)}
"""Bytes of NaN that the gguf package decodes to numbers."""


@pytest.mark.parametrize("kind", reference.DEQUANTIZE)
def test_the_check_agrees_with_the_gguf_package(kind):
    generator = np.random.default_rng(0)
    nbytes, seen = reference.block_of(kind)[1], set()
    for _ in range(200):
        block = generator.integers(0, 256, (1, nbytes), dtype=np.uint8)
        if generator.random() < 0.5:  # a byte with all bits set is likely part of a bad exponent
            block[0, generator.integers(nbytes)] |= 0x7F
        if kind in SPECIAL:
            at, byte = SPECIAL[kind]
            block[0, :4] = generator.integers(0, 0x7E, 4)
            finite = bool(generator.random() < 0.5)
            block[0, at] = block[0, at] if finite else byte
        else:
            with np.errstate(all="ignore"):
                values = dequantize(block, GGMLQuantizationType[kind])
            finite = bool(np.isfinite(values).all())
        seen.add(finite)
        try:
            check_scales(torch.from_numpy(block), kind, "w")
            assert finite
        except CheckpointError:
            assert not finite
    assert seen == {True, False}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    save_tiny_model("llama", root / "dense")
    quantize(str(root / "dense"), root / "packed", "gguf", {"type": "Q8_0"},
             exclude=["*.down_proj"])  # fmt: skip
    file = root / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_proj.weight.blocks"][3, 1] = 0x7C
    save_file(tensors, file, {"format": "pt"})
    file.with_name("SHA256SUMS").unlink()  # the values are checked too
    return root / "packed"


NAMED = r"model\.layers\.1\.self_attn\.q_proj\.weight: expected finite scales"


@pytest.fixture(scope="module")
def damaged_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "tiny.gguf"
    write_tiny_gguf("llama", path, kind="Q8_0")
    (found,) = [t for t in GGUFReader(path, "r+").tensors if t.name == "blk.1.attn_q.weight"]
    found.data[3, 1] = 0x7C
    return path


@pytest.mark.parametrize("way", ["load", "merge", "convert"])
@pytest.mark.parametrize("model", ["damaged", "damaged_file"])
def test_it_is_refused_by_name(model, way, request, tmp_path):
    source = request.getfixturevalue(model)
    if (model, way) == ("damaged", "convert"):
        pytest.skip("no folder's format holds these blocks")
    ways = {
        "load": lambda: load_model(source, device="cpu"),
        "merge": lambda: merge(str(source), tmp_path / "out"),
        "convert": lambda: convert(str(source), tmp_path / "out", "modulora"),
    }
    with pytest.raises(CheckpointError, match=NAMED):
        ways[way]()
    assert not (tmp_path / "out").exists()


def test_mapped_checks_at_the_first_touch(damaged):
    model = load_model(damaged, device="cpu", mapped=True)
    with pytest.raises(CheckpointError, match=NAMED):
        model(torch.tensor([[1, 2, 3]]))


def test_info_verifies_a_file(damaged_file, tmp_path, capsys):
    assert main(["info", str(damaged_file)]) == 0
    assert main(["info", str(damaged_file), "--verify"]) == 2
    assert re.search(NAMED, capsys.readouterr().err)
    path = write_tiny_gguf("llama", tmp_path / "sound.gguf", kind="Q8_0")
    assert main(["info", str(path), "--verify"]) == 0
    assert "16 packed parameters are whole, and their scales finite" in capsys.readouterr().err
