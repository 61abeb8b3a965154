"""EXL3 tensors and folders are read as GPTQModel and the format's description read them."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from exl3_folders import alike, mixed, save_exl3
from exl3_tensors import BITS, CODES, HALVES, inner, random_layer, weight
from modulora_qtip import trellis
from modulora_qtip.formats.exl3 import EXL3
from modulora_qtip.quantizer import QTIP

from modulora_core.checkpoints.opening import open_packed
from modulora_core.hf.load_model import load_model
from modulora_core.models import installed_formats
from modulora_core.spec import TensorLayout
from modulora_core.tests.other_tools import assert_close, assert_used, logits

ORACLE = json.loads((Path(__file__).parent / "oracle.json").read_text())
LAYERS = ORACLE["layers"]


def experts(name, number):
    """Experts are packed alike, but their gates, ups and downs differ."""
    bits = {"gate_proj": 2, "up_proj": 3, "down_proj": 4}
    return {"bits": bits.get(name.rpartition(".")[2], 5), "code": "mcg", "signs": number == 1}


def halves(_, number):
    return {"bits": HALVES[number % 3], "code": "mul1"}


def read(tensors):
    """A layer ``m`` with these tensors, as a folder's reader gives it."""
    stored = {f"m.{name}": tensor for name, tensor in tensors.items()}
    layouts = {name: TensorLayout.of(tensor) for name, tensor in stored.items()}
    reader = installed_formats.create("exl3")
    assert isinstance(reader, EXL3)
    return reader.weights({}, layouts, stored.__getitem__)["m"].unpack(stored.__getitem__)


@pytest.mark.parametrize("name", LAYERS)
def test_every_width_and_code_decodes_as_by_gptqmodel(name):
    bits, code, *signs = name.split()
    shape = tuple(ORACLE["shape"])
    tensors = random_layer(shape, int(bits), code, seed=int(bits), signs=bool(signs))
    packed = read(tensors)
    facts = (packed.metadata[fact] for fact in ("bits", "states", "code"))
    C = trellis.decode(packed.tensors["trellis"], *facts).T.half().contiguous()
    assert hashlib.sha256(C.numpy().tobytes()).hexdigest() == LAYERS[name]["inner"]
    W = QTIP().dequantize_tile(packed, (0, shape[0]), torch.float32)
    peer = torch.tensor(LAYERS[name]["weight"])
    found = W.view(-1)[:: W.numel() // len(peer)]
    # the peer doesn't round values to fp16 before it rotates them
    assert float((found - peer).abs().max()) < 2**-11 * float(W.abs().max())


EVERY = [(bits, code) for bits in BITS for code in CODES] + [(bits, "mul1") for bits in HALVES]


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize(("bits", "code"), EVERY)
def test_every_value_is_by_the_description(bits, code, signs):
    tensors = random_layer((256, 128), bits, code, seed=100 + int(2 * bits), signs=signs)
    packed, expected = read(tensors), weight(tensors)
    C = trellis.decode(packed.tensors["trellis"], bits, 16, code)
    assert torch.equal(C.T.half(), torch.from_numpy(inner(tensors)))
    W = QTIP().dequantize_tile(packed, (0, 256), torch.float64)
    torch.testing.assert_close(W, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 2**-11)):
        W = QTIP().dequantize_tile(packed, (0, 256), dtype)
        assert float((W - expected).abs().max()) <= limit * float(expected.abs().max())
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(QTIP().matmul(x, packed), x @ expected.T)


@pytest.mark.parametrize(
    ("choice", "options"),
    [
        (mixed, {}),
        (mixed, {"storage": False}),
        (mixed, {"in_config": False}),
        (alike(2, "mcg"), {"tie_word_embeddings": True}),
        (halves, {}),
        (alike(3, "mul1"), {"vocab_size": 603, "intermediate_size": 200}),
        (alike(2, "3inst"), {"architecture": "phi3"}),
        (
            alike(2, "mcg"),
            {
                "architecture": "phi3",
                "parts": {
                    "qkv_proj": {"q_proj": 256, "k_proj": 128, "v_proj": 128},
                    "gate_up_proj": {"gate_proj": 256, "up_proj": 256},
                },
            },
        ),
        (experts, {"architecture": "qwen3_moe"}),
    ],
    ids=[
        "mixed", "no-tensor-storage", "quantization_config.json", "tied", "halves", "padded",
        "fused", "in-parts", "experts",
    ],
)  # fmt: skip
def test_a_folder_is_the_model_that_it_holds(choice, options, tmp_path):
    dense = save_exl3(tmp_path, choice=choice, **options)
    model = load_model(tmp_path, dtype="float32", device="cpu")
    assert_close(logits(model), logits(dense))
    record = open_packed(tmp_path).record
    assert record.source["format"] == "exl3"
    assert "lm_head.weight" in record.weights
    assert record.kept.keys() <= {"embedding", "bias", "norm", "router"}


def test_a_folder_is_finetuned_converted_merged_and_asked(tmp_path):
    save_exl3(tmp_path / "m", vocab_size=640)
    assert_used(tmp_path / "m", tmp_path)
