"""HQQ folders, written tensor by tensor as the authors' package does, are read."""

import json

import pytest
import torch
from modulora_convert.convert import convert
from modulora_half_quadratic.formats import HQQ
from modulora_half_quadratic.quantizer import HalfQuadratic
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.models import installed_formats
from modulora_core.models.formats import FormatSpec
from modulora_core.spec import TensorLayout

UP = "model.layers.0.mlp.up_proj"


def layer(shape, bits=4, group=16, stored=torch.float16):
    """The tensors of a random layer, and its weight, fp32."""
    rows = shape[0] * shape[1] // group
    q = torch.randint(0, 2**bits, (rows, group))
    s, z = torch.rand(rows, 1) / 50 + 0.01, torch.rand(rows, 1) * (2**bits - 1)
    s, z = s.to(stored), z.to(stored)
    fields = 10 if bits == 3 else 8 // bits
    step = -(-rows // fields)
    words = torch.zeros(step, group, dtype=torch.int32)
    for row in range(rows):
        words[row % step] |= (q[row] << bits * (fields - 1 - row // step)).int()
    numbers = {"nbits": bits, "group_size": group, "axis": 1}
    tensors = {
        "W_q": words if bits == 3 else words.to(torch.uint8),
        "scale": s, "zero": z, "shape": torch.tensor(shape),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
        "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8),
    }  # fmt: skip
    return tensors, ((q - z.float()) * s.float()).view(shape)


def read_layer(tensors):
    """Our packed weight of one layer ``M``."""
    named = {f"M.{name}": tensor for name, tensor in tensors.items()}
    layouts = {name: TensorLayout.of(t) for name, t in named.items() if t.dtype != torch.int64}
    spec = FormatSpec(name="hqq", summary="", location="a:B", protocol=2, quant_methods=("hqq",))
    return HQQ(spec).weights({}, layouts, named.__getitem__)["M"].unpack(named.__getitem__)


def assert_close(packed, W, bound):
    ours = HalfQuadratic().dequantize_tile(packed, (0, W.shape[0]), torch.float32)
    assert ((ours - W).abs() <= bound).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_every_width_is_read_within_fp16(bits, stored):
    torch.manual_seed(0)
    tensors, W = layer((24, 48), bits, 16, stored)
    offsets = (tensors["scale"].float() * tensors["zero"].float()).view(24, 3)
    assert_close(read_layer(tensors), W, (2**-11 + 1e-6) * offsets.repeat_interleave(16, 1))


def save_hqq(folder, **changed):
    """Save a tiny Llama of HQQ's layers. Returns the same model, dense."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    dense.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name, module in dense.named_modules():
        if name.endswith("proj"):
            tensors, module.weight.data = layer(tuple(module.weight.shape))
            del stored[f"{name}.weight"]
            stored |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    save_file(stored | changed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


@pytest.fixture
def installed():
    if "hqq" not in installed_formats.specs():
        pytest.skip("pip install ./examples/third_party_plugin")


@pytest.mark.usefixtures("installed")
def test_a_folder_is_a_model(tmp_path):
    folder, converted_to = tmp_path / "theirs", tmp_path / "ours"
    dense = save_hqq(folder)
    model = load_model(folder, dtype="float32", device="cpu")
    assert len(open_packed(folder).record.weights) == 14
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = dense(ids).logits
        error = model(ids).logits - expected
    assert error.norm() < 0.01 * expected.norm()
    convert(str(folder), converted_to, "modulora")
    converted = load_model(converted_to, dtype="float32", device="cpu")
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("axis", torch.tensor(0), ModelError, "expected HQQ's axis 1, .* got axis 0, 4 bits"),
        ("group_size", torch.tensor(6), ModelError, "groups of 6 in rows of 32"),
        ("group_size", torch.tensor(4), ModelError, "group_size 4: .* greater than or equal to 8"),
        ("zero", torch.zeros(3, 1), CheckpointError, r"up_proj.zero: expected \[96, 1\] by"),
        ("W_q", torch.zeros(3, 1), CheckpointError, r"up_proj.W_q: expected 768 bytes"),
    ],
)  # fmt: skip
def test_other_layers_are_refused(part, value, error, message, tmp_path):
    save_hqq(tmp_path, **{f"{UP}.{part}": value})
    with pytest.raises(error, match=message):
        open_packed(tmp_path)
