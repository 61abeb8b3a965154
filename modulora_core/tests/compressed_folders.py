"""Folders that the package compressed-tensors packs, and transformers reads."""

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modulora_core.tests.other_tools import _SIZES
from modulora_core.tests.tiny_tokenizer import make_tokenizer


def save_compressed(folder, name, dtype=torch.bfloat16, architecture="llama", **weights):
    """Save a tiny model in the format ``name``, whose layers but the head have these arguments."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**_SIZES[architecture]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = {}
    dense = load_file(folder / "model.safetensors")
    for key, tensor in dense.items():
        module = key.removesuffix(".weight")
        if not key.endswith("_proj.weight"):
            stored[key] = tensor
            continue
        pair = {key.replace("gate_proj", "up_proj"), key.replace("up_proj", "gate_proj")}
        parameters = _parameters(tensor, args, torch.cat([dense[name] for name in pair]))
        compressed = compressor.compress({"weight": tensor, **parameters}, scheme)
        stored |= {f"{module}.{part}": t.contiguous() for part, t in compressed.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _parameters(weight, args, fused):
    """Scales and zero points by compressed-tensors' rules; the global scale is of ``fused``."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    low, high = groups.amin(2), groups.amax(2)
    more = {}
    if args.strategy == "tensor_group":
        more["global_scale"] = generate_gparam(fused.min(), fused.max())
    scale, zero = calculate_qparams(low, high, args, **more)
    made = {"weight_scale": scale, "weight_zero_point": zero}
    return made | {f"weight_{name}": value for name, value in more.items()}


def load_dequantized(folder, dtype=torch.float32):
    """The folder as transformers makes it of floats."""
    from transformers import CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    return model.to(dtype)  # transformers before 5.24 keeps bf16
