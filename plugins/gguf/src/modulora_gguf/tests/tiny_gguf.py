"""Write tiny GGUF files of random values, with llama.cpp's names and shapes."""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from modulora_gguf.quantizer import damaged

VOCABULARY = 64
HIDDEN = 32


Shapes = dict[str, tuple[int, ...]]


def _attention(bias: bool = False) -> Shapes:
    rows = {"attn_q": 32, "attn_k": 16, "attn_v": 16}
    tensors: Shapes = {f"{name}.weight": (n, HIDDEN) for name, n in rows.items()}
    if bias:
        tensors |= {f"{name}.bias": (n,) for name, n in rows.items()}
    return {
        **tensors,
        "attn_output.weight": (HIDDEN, 32),
        "attn_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
    }


_MLP: Shapes = {
    "ffn_gate.weight": (64, HIDDEN),
    "ffn_up.weight": (64, HIDDEN),
    "ffn_down.weight": (HIDDEN, 64),
}
_HEAD_NORMS: Shapes = {"attn_q_norm.weight": (8,), "attn_k_norm.weight": (8,)}
_EMBEDDING: Shapes = {"token_embd.weight": (VOCABULARY, HIDDEN)}
_TOP: Shapes = {**_EMBEDDING, "output_norm.weight": (HIDDEN,)}
_HEAD: Shapes = {"output.weight": (VOCABULARY, HIDDEN)}
_SIZES = {
    "context_length": 64,
    "block_count": 2,
    "embedding_length": HIDDEN,
    "feed_forward_length": 64,
}
_ROPE = {
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
_GROUPED = {**_SIZES, **_ROPE, "attention.head_count": 4, "attention.head_count_kv": 2}
_EXPERT_ROWS = (
    768  # transformers reads no expert width from a GGUF header: it is the default of the class
)

_GPT2_LAYER: Shapes = {
    "attn_qkv.weight": (96, HIDDEN),
    "attn_qkv.bias": (96,),
    "attn_output.weight": (HIDDEN, HIDDEN),
    "attn_output.bias": (HIDDEN,),
    "attn_norm.weight": (HIDDEN,),
    "attn_norm.bias": (HIDDEN,),
    "ffn_norm.weight": (HIDDEN,),
    "ffn_norm.bias": (HIDDEN,),
    "ffn_up.weight": (128, HIDDEN),
    "ffn_up.bias": (128,),
    "ffn_down.weight": (HIDDEN, 128),
    "ffn_down.bias": (HIDDEN,),
}
_EMBEDDING_NORM: Shapes = {"token_embd_norm.weight": (HIDDEN,), "token_embd_norm.bias": (HIDDEN,)}
_EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (2, HIDDEN),
    "ffn_gate_exps.weight": (2, _EXPERT_ROWS, HIDDEN),
    "ffn_up_exps.weight": (2, _EXPERT_ROWS, HIDDEN),
    "ffn_down_exps.weight": (2, HIDDEN, _EXPERT_ROWS),
}

# the header's fields, the tensors outside of layers, the tensors of each layer
ARCHITECTURES: dict[str, tuple[dict[str, Any], Shapes, Shapes]] = {
    "llama": (_GROUPED, {**_TOP, **_HEAD}, {**_attention(), **_MLP}),
    "mixtral": (
        {**_GROUPED, "expert_count": 2, "expert_used_count": 1},
        {**_TOP, **_HEAD},
        {
            **_attention(),
            "ffn_gate_inp.weight": (2, HIDDEN),
            **{name.replace(".", "_exps."): (2, *shape) for name, shape in _MLP.items()},
        },
    ),
    "qwen2": (_GROUPED, _TOP, {**_attention(bias=True), **_MLP}),
    "gpt2": (
        {
            **_SIZES,
            "context_length": 1024,
            "attention.head_count": 4,
            "attention.layer_norm_epsilon": 1e-5,
        },
        {**_TOP, "output_norm.bias": (HIDDEN,), "position_embd.weight": (1024, HIDDEN), **_HEAD},
        _GPT2_LAYER,
    ),
    "bloom": (
        {
            **_SIZES,
            "attention.head_count": 4,
            "attention.layer_norm_epsilon": 1e-5,
        },
        {**_TOP, "output_norm.bias": (HIDDEN,), **_EMBEDDING_NORM},
        _GPT2_LAYER,
    ),
    "qwen3moe": (
        {
            **_GROUPED,
            "attention.key_length": 8,
            "expert_count": 2,
            "expert_used_count": 1,
            "expert_feed_forward_length": _EXPERT_ROWS,
        },
        {**_TOP, **_HEAD},
        {**_attention(), **_HEAD_NORMS, **_EXPERTS},
    ),
    "qwen35moe": (  # its layers of linear attention are left out
        {
            **_GROUPED,
            "attention.head_count_kv": 1,
            "attention.key_length": 8,
            "rope.dimension_sections": [2, 1, 1, 0],
            "full_attention_interval": 1,
            **dict.fromkeys(("ssm.conv_kernel", "ssm.time_step_rank", "ssm.group_count"), 4),
            **dict.fromkeys(("ssm.state_size", "ssm.inner_size"), 32),
            "expert_count": 2,
            "expert_used_count": 1,
            "expert_feed_forward_length": _EXPERT_ROWS,
            "expert_shared_feed_forward_length": 64,
        },
        {**_TOP, **_HEAD},
        {
            **{f"attn_{n}.weight": (rows, HIDDEN) for n, rows in {"q": 64, "k": 8, "v": 8}.items()},
            "attn_output.weight": (HIDDEN, 32),
            "attn_norm.weight": (HIDDEN,),
            "post_attention_norm.weight": (HIDDEN,),
            **_HEAD_NORMS,
            **_EXPERTS,
            "ffn_gate_inp_shexp.weight": (HIDDEN,),
            **{name.replace(".", "_shexp."): shape for name, shape in _MLP.items()},
        },
    ),
    "lfm2": (
        {**_GROUPED, "attention.head_count_kv": [2, 2], "shortconv.l_cache": 3},
        {**_EMBEDDING, "token_embd_norm.weight": (HIDDEN,)},
        {**_attention(), **_HEAD_NORMS, **_MLP},
    ),
}


_WIDER = ("embedding_length", "feed_forward_length", "rope.dimension_count", "attention.key_length")


def _wide(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Every size eight times, but the vocabulary, the experts and their rows."""
    kept = {0} if name in (*_EMBEDDING, *_HEAD) or "exps" in name or "inp" in name else set()
    return tuple(n if i in kept or n == _EXPERT_ROWS else 8 * n for i, n in enumerate(shape))


def _kind_of(name: str, kind: str | dict[str, str]) -> str:
    if isinstance(kind, str):
        return kind
    return next(kind[part] for part in sorted(kind, key=len, reverse=True) if part in name)


@cache
def _pool(kind: Kind) -> np.ndarray:
    """Blocks of random bytes whose scales are numbers, and whose weights of an ordinary size."""
    nbytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(0).integers(0, 256, (4096, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(gguf.quants.dequantize(blocks, kind)).max(axis=1)
    sound = ~damaged(torch.from_numpy(blocks), kind.name)
    return blocks[sound & (largest > 0.1) & (largest < 5)]


def random_blocks(kind: Kind, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """The bytes of a tensor of ``shape`` in a type that the gguf package doesn't pack."""
    pool, weights = _pool(kind), gguf.GGML_QUANT_SIZES[kind][0]
    chosen = pool[random.integers(0, len(pool), (*shape[:-1], shape[-1] // weights))]
    return chosen.reshape(*shape[:-1], -1)


def write_tiny_gguf(
    architecture: str,
    path: Path,
    kind: str | dict[str, str] = "F32",
    extra: tuple[str, ...] = (),
    wide: bool = False,
    split: int = 0,
    scaled: str = "",
) -> Path:
    """Write a file with matrices of a type and F32 vectors. Returns ``path``, or the first part.

    Args:
        kind: the type of all matrices, or of each by a part of its name, with ``""`` for others.
        wide: rows have 256 weights or a multiple, as most types need; not for GPT-2 and LFM2.
        split: the most tensors of a part, after a first part without any.
        scaled: the type whose matrices have another scale, as llama.cpp writes it for NVFP4.
    """
    fields, top, layer = ARCHITECTURES[architecture]
    if wide:
        fields = {n: 8 * v if n in _WIDER else v for n, v in fields.items()}
        top, layer = ({n: _wide(n, s) for n, s in shapes.items()} for shapes in (top, layer))
    random = np.random.default_rng(0)
    more = {"split_max_tensors": split, "small_first_shard": True} if split else {}
    architecture = "llama" if architecture == "mixtral" else architecture
    writer = gguf.GGUFWriter(path, architecture, **more)
    for key, value in fields.items():
        adders = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array,
                  str: writer.add_string}  # fmt: skip
        adders[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*string.ascii_letters, *string.digits, "Ġ", "th"])  # Ġ is a space
    writer.add_token_merges(["t h"])
    shapes = dict(top)
    for number in range(2):
        shapes |= {f"blk.{number}.{name}": shape for name, shape in layer.items()}
    shapes |= dict.fromkeys(extra, (HIDDEN,))
    for name, shape in list(shapes.items()):
        if scaled and len(shape) > 1 and _kind_of(name, kind) == scaled:
            shapes[name.replace(".weight", ".scale")] = shape[:-2] or (1,)
    for name, shape in shapes.items():
        stored = Kind.F32 if len(shape) == 1 or "scale" in name else Kind[_kind_of(name, kind)]
        try:
            values = random.standard_normal(shape, dtype=np.float32)
            data = gguf.quants.quantize(values, stored)
        except NotImplementedError:  # the gguf package only reads this type
            data = random_blocks(stored, shape, random)
        writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split else path
