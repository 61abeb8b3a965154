"""Move the rows of a GGUF tensor, for architectures whose tensors transformers reads wrongly.

Each class undoes a change of llama.cpp's converter, and extends transformers' tensor processor.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.modeling_gguf_pytorch_utils import (
    GGUFTensor,
    LlamaTensorProcessor,
    Qwen2MoeTensorProcessor,
    TensorProcessor,
)

_EXPERTS = re.compile(r"(?:model\.)?layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?")
_PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}


class GptOss(TensorProcessor):
    """gpt-oss: gates and ups alternate in memory, and a stack of experts is transposed."""

    def perform_fallback_tensor_mapping(
        self, gguf_to_hf_name_map: dict[str, str], suffix: str, qual_name: str, hf_name: str
    ) -> None:
        """Add the names in the file of a parameter that the gguf package doesn't know."""
        del suffix
        if found := _EXPERTS.fullmatch(hf_name):
            end = ".bias" if found[3] else ".weight"
            for part in _PARTS[found[2]]:
                name = f"blk.{found[1]}.ffn_{part}_exps{end}"
                gguf_to_hf_name_map[name] = qual_name + hf_name

    def process(self, weights: NDArray[Any], name: str, **kwargs: Any) -> GGUFTensor:
        """``weights`` as in memory; gates and ups go into ``parsed_parameters`` together."""
        if "_exps.weight" in name:
            weights = weights.swapaxes(1, 2)  # [experts, in, out]
        if "ffn_gate_exps" not in name and "ffn_up_exps" not in name:
            return GGUFTensor(weights, name, {})
        import torch

        shape = (*weights.shape[:-1], 2 * weights.shape[-1])
        tensors, target = kwargs["parsed_parameters"]["tensors"], kwargs["tensor_key_mapping"][name]
        values = torch.from_numpy(np.ascontiguousarray(weights))
        both = tensors.setdefault(target, torch.zeros(shape, dtype=values.dtype))
        both[..., 0 if "gate" in name else 1 :: 2] = values
        return GGUFTensor(weights, None, {})


class Falcon(TensorProcessor):
    """Falcon: in memory the queries of each group have its key and its value behind them."""

    def process(self, weights: NDArray[Any], name: str, **kwargs: Any) -> GGUFTensor:
        """``weights`` as in memory, out of all queries, all keys and all values."""
        del kwargs
        groups = self.config.get("num_key_value_heads") or 1
        if "attn_qkv" in name:
            queries = self.config["num_attention_heads"] // groups
            size = len(weights) // (groups * (queries + 2))  # of a head
            parts = np.split(weights, [groups * queries * size, groups * (queries + 1) * size])
            grouped = [part.reshape(groups, -1, *weights.shape[1:]) for part in parts]
            weights = np.concatenate(grouped, axis=1).reshape(weights.shape)
        return GGUFTensor(weights, name, {})


class Mixtral(Qwen2MoeTensorProcessor):
    """Mixtral: experts as Qwen's, and rows of q and k as Llama's."""

    def process(self, weights: NDArray[Any], name: str, **kwargs: Any) -> GGUFTensor:
        """``weights`` as in memory; gates and ups go into ``parsed_parameters`` together."""
        if ".attn_" in name:
            return LlamaTensorProcessor(self.config).process(weights, name, **kwargs)
        return super().process(weights, name, **kwargs)


PROCESSORS: dict[str, type[TensorProcessor]] = {
    "falcon": Falcon, "gpt-oss": GptOss, "mixtral": Mixtral,
}  # fmt: skip
"""By the architecture in the file; a llama with experts is ``"mixtral"``."""
