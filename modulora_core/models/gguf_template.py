"""Make a GGUF file without values from a config and a tokenizer: metadata, and names of tensors.

It follows llama.cpp's ``convert_hf_to_gguf.py`` for the architectures of :data:`ARCHITECTURES` and
for byte-level BPE. Everything else is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modulora_core.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""transformers' model types and llama.cpp's architectures."""

_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")
_INSTEAD = "give a GGUF file of the same model with --base FILE.gguf"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def write_template(
    path: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Write the file: all tensors are F32, and their data is a hole that takes no room on a disk.

    Args:
        path: a new file.
        config: of the model; shapes: of each parameter by its name in memory.
        tokenizer: of the model.

    Raises:
        ModelError: the architecture, its rotary embedding or its tokenizer can't be written.
    """
    from gguf import GGUFWriter

    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"model_type {config.model_type}: expected one of {', '.join(ARCHITECTURES)}, which "
            f"can be written as GGUF from a folder; {_INSTEAD}"
        )
    writer = GGUFWriter(path, ARCHITECTURES[config.model_type])
    _add_sizes(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    nbytes = 0
    for name, shape in _tensors(config, shapes):
        size = 4 * math.prod(shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        nbytes += size + writer.data_alignment
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except struct.error as error:
        raise ModelError(
            f"config.json: expected values that GGUF can hold, got one that it can't: {error}; "
            f"{_INSTEAD}"
        ) from None
    finally:
        writer.close()
    os.truncate(path, path.stat().st_size + nbytes + writer.data_alignment)


def _add_sizes(writer: GGUFWriter, config: PretrainedConfig) -> None:
    rope = config.rope_parameters
    _check_plain(config, rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _check_plain(config: PretrainedConfig, rope: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's architecture hasn't got, or what needs more metadata."""
    is_mixture = config.model_type == "qwen3_moe"
    window = getattr(config, "sliding_window", None)
    found = {
        f"rotary embeddings of type {rope.get('rope_type')}": rope.get("rope_type", "default")
        != "default",
        f"a sliding window of {window}": window is not None
        and window < config.max_position_embeddings,
        "norm_topk_prob false": is_mixture and not config.norm_topk_prob,
        "dense layers among mixtures": is_mixture
        and bool(config.mlp_only_layers or config.decoder_sparse_step != 1),
    }
    for text, is_there in found.items():
        if is_there:
            raise ModelError(
                f"model_type {config.model_type}: it has {text}, which can't be written as GGUF "
                f"from a folder; {_INSTEAD}"
            )


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    fast: Any = tokenizer
    described = json.loads(fast.backend_tokenizer.to_str())
    kind = described["model"]["type"]
    before = _pre_tokenizer(described.get("pre_tokenizer") or {})
    if kind != "BPE" or before is None:
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: expected a byte-level BPE whose splits "
            f"llama.cpp knows, got {kind}; {_INSTEAD}"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [_UNUSED] * size
    for token, i in described["model"]["vocab"].items():
        tokens[i], types[i] = token, _NORMAL
    for added in described["added_tokens"]:
        i = added["id"]
        tokens[i], types[i] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    pairs = described["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(before)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    for name in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(described: dict[str, Any]) -> str | None:
    """llama.cpp's name of the rule that splits text into words."""
    steps = described.get("pretokenizers", [described])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds != ["Split", "ByteLevel"]:
        return None
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # older versions
        return None
    pattern = steps[0]["pattern"].get("Regex")
    return next((name for name, one in GGUF_PRE_TOKENIZER_SPLITS.items() if one == pattern), None)


def _tensors(
    config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and the shape of each tensor. A fused stack of gates and ups is two."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    architecture = numbers[ARCHITECTURES[config.model_type]]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    for parameter, shape in shapes.items():
        fused = _FUSED.fullmatch(parameter)
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if fused is not None and fused[2] == "gate_up":
            experts, rows, columns = shape
            for part in ("gate", "up"):
                yield f"blk.{fused[1]}.ffn_{part}_exps.weight", (experts, rows // 2, columns)
        elif fused is not None:
            yield f"blk.{fused[1]}.ffn_down_exps.weight", shape
        elif name is not None:
            yield name, shape
        else:
            raise ModelError(
                f"{parameter}: llama.cpp's {ARCHITECTURES[config.model_type]} has no tensor of it; "
                f"{_INSTEAD}"
            )
