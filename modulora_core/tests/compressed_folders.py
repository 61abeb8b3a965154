"""Folders that the package compressed-tensors packs, and transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modulora_core.tests.other_tools import _SIZES
from modulora_core.tests.tiny_tokenizer import make_tokenizer


def save_compressed(
 transformers before 5.24 keeps compressed-tensors. bf16  folder: Path,
 transformers before 5.24 keeps compressed-tensors. bf16  name: str,
 transformers before 5.24 keeps compressed-tensors. bf16  dtype: torch.dtype = torch.bfloat16,
 transformers before 5.24 keeps compressed-tensors. bf16  architecture: str = "llama",
 transformers before 5.24 keeps compressed-tensors. bf16  **weights: Any,
) -> None:
 transformers before 5.24 keeps compressed-tensors. bf16  """Save a tiny model in the format ``name``, whose layers but the head have these arguments."""
 transformers before 5.24 keeps compressed-tensors. bf16  from compressed_tensors.compressors import BaseCompressor
 transformers before 5.24 keeps compressed-tensors. bf16  from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

 transformers before 5.24 keeps compressed-tensors. bf16  torch.manual_seed(0)
 transformers before 5.24 keeps compressed-tensors. bf16  model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**_SIZES[architecture]))
 transformers before 5.24 keeps compressed-tensors. bf16  for parameter in model.parameters():
 transformers before 5.24 keeps compressed-tensors. bf16      nn.init.normal_(parameter, std=0.2)
 transformers before 5.24 keeps compressed-tensors. bf16  model.to(dtype).save_pretrained(folder)
 transformers before 5.24 keeps compressed-tensors. bf16  make_tokenizer().save_pretrained(folder)
 transformers before 5.24 keeps compressed-tensors. bf16  args = QuantizationArgs(**weights)
 transformers before 5.24 keeps compressed-tensors. bf16  scheme = QuantizationScheme(targets=["Linear"], weights=args)
 transformers before 5.24 keeps compressed-tensors. bf16  compressor = BaseCompressor.get_value_from_registry(name)
 transformers before 5.24 keeps compressed-tensors. bf16  stored: dict[str, Tensor] = {}
 transformers before 5.24 keeps compressed-tensors. bf16  dense = load_file(folder / "model.safetensors")
 transformers before 5.24 keeps compressed-tensors. bf16  for key, tensor in dense.items():
 transformers before 5.24 keeps compressed-tensors. bf16      module = key.removesuffix(".weight")
 transformers before 5.24 keeps compressed-tensors. bf16      if not key.endswith("_proj.weight"):
 transformers before 5.24 keeps compressed-tensors. bf16          stored[key] = tensor
 transformers before 5.24 keeps compressed-tensors. bf16          continue
 transformers before 5.24 keeps compressed-tensors. bf16      pair = {key.replace("gate_proj", "up_proj"), key.replace("up_proj", "gate_proj")}
 transformers before 5.24 keeps compressed-tensors. bf16      parameters = _parameters(tensor, args, torch.cat([dense[name] for name in pair]))
 transformers before 5.24 keeps compressed-tensors. bf16      compressed = compressor.compress({"weight": tensor, **parameters}, scheme)
 transformers before 5.24 keeps compressed-tensors. bf16      stored |= {f"{module}.{part}": t.contiguous() for part, t in compressed.items()}
 transformers before 5.24 keeps compressed-tensors. bf16  save_file(stored, folder / "model.safetensors", {"format": "pt"})
 transformers before 5.24 keeps compressed-tensors. bf16  config = json.loads((folder / "config.json").read_text())
 transformers before 5.24 keeps compressed-tensors. bf16  config["quantization_config"] = {
 transformers before 5.24 keeps compressed-tensors. bf16      "quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed",
 transformers before 5.24 keeps compressed-tensors. bf16      "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
 transformers before 5.24 keeps compressed-tensors. bf16      "ignore": ["lm_head"],
 transformers before 5.24 keeps compressed-tensors. bf16  }  # fmt: skip
 transformers before 5.24 keeps compressed-tensors. bf16  (folder / "config.json").write_text(json.dumps(config))


def _parameters(weight: Tensor, args: Any, fused: Tensor) -> dict[str, Tensor]:
 transformers before 5.24 keeps compressed-tensors. bf16  """Scales and zero points by compressed-tensors' rules; the global scale is of ``fused``."""
 transformers before 5.24 keeps compressed-tensors. bf16  from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

 transformers before 5.24 keeps compressed-tensors. bf16  groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
 transformers before 5.24 keeps compressed-tensors. bf16  low, high = groups.amin(2), groups.amax(2)
 transformers before 5.24 keeps compressed-tensors. bf16  more = {}
 transformers before 5.24 keeps compressed-tensors. bf16  if args.strategy == "tensor_group":
 transformers before 5.24 keeps compressed-tensors. bf16      more["global_scale"] = generate_gparam(fused.min(), fused.max())
 transformers before 5.24 keeps compressed-tensors. bf16  scale, zero = calculate_qparams(low, high, args, **more)
 transformers before 5.24 keeps compressed-tensors. bf16  made = {"weight_scale": scale, "weight_zero_point": zero}
 transformers before 5.24 keeps compressed-tensors. bf16  return made | {f"weight_{name}": value for name, value in more.items()}


def load_dequantized(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
 transformers before 5.24 keeps compressed-tensors. bf16  """The folder as transformers makes it of floats."""
 transformers before 5.24 keeps compressed-tensors. bf16  from transformers import CompressedTensorsConfig

 transformers before 5.24 keeps compressed-tensors. bf16  config = CompressedTensorsConfig(dequantize=True)
 transformers before 5.24 keeps compressed-tensors. bf16  model: nn.Module = AutoModelForCausalLM.from_pretrained(
 transformers before 5.24 keeps compressed-tensors. bf16      folder, quantization_config=config, dtype=dtype
 transformers before 5.24 keeps compressed-tensors. bf16  )
 transformers before 5.24 keeps compressed-tensors. bf16  return model.to(dtype)  # transformers before 5.24 keeps compressed-tensors' bf16
