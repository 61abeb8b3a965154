"""An outsider's quantizer with a vector for each side of its codes, installed as a package."""

from transformers import AutoModelForCausalLM

from modulora_core.tests.conftest import installed_quantizers
from modulora_core.tests.tiny_models import tiny_config
from modulora_core.tests.tiny_tokenizer import make_tokenizer

INIT = """
from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec

SCALED = QuantizerSpec(
    name="scaled", summary="-1, 0 or 1 times a factor for its row and its column", protocol=2,
    bits=(2,), location="modulora_scaled.quantizer:Scaled", calibration="optional", rescales=True,
)

@hookimpl
def modulora_quantizers():
    return [SCALED]
"""

QUANTIZER = """
import torch
from modulora_core.spec import PackedWeight, Quantizer
from modulora_scaled import SCALED

class Scaled(Quantizer):
    # vectors in fp16, so that folding rounds

    spec = SCALED

    def pack(self, weight, calibration=None):
        w = weight.float()
        rows = w.abs().mean(dim=1) + 1e-6  # too small a factor on average, as tuning will find
        codes = (w / rows[:, None]).round().clamp(-1, 1).to(torch.int8)
        columns = torch.ones(w.shape[1], dtype=torch.float16)
        tensors = {"codes": codes, "rows": rows.half(), "columns": columns}
        return PackedWeight("scaled", 1, tuple(w.shape), tensors)

    def dequantize_tile(self, packed, rows, dtype):
        codes, factors = (packed.tensors[name][slice(*rows)].float() for name in ("codes", "rows"))
        return (codes * packed.tensors["columns"].float() * factors[:, None]).to(dtype)

    def rescaled(self, packed, input_scale, output_scale):
        t = packed.tensors
        tensors = {"codes": t["codes"], "rows": (t["rows"].float() * output_scale).half(),
                   "columns": (t["columns"].float() * input_scale).half()}
        return PackedWeight("scaled", 1, packed.shape, tensors)
"""


def installed(root):
    return installed_quantizers(root, "scaled", INIT, QUANTIZER)


def save_model_with_tokenizer(architecture, folder, dtype="float32"):
    """A tiny random model that can read text. Returns ``folder``."""
    import torch

    config = tiny_config(architecture)
    config.vocab_size = 600
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                spread = 0.2 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + spread if "norm" in name and name.endswith("weight") else spread)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
