"""Set the rotary embedding that a GGUF file describes. transformers reads its base, at most.

llama.cpp divides the frequencies of a head by one factor (``linear``), by YaRN's factors, or by a
tensor of factors. Llama 3.1 to 3.3 have one such tensor. Phi-3 with long contexts has two, for
short and for long texts. transformers' LongRoPE takes any of them.
"""

from __future__ import annotations

from typing import Any

from modulora_core.errors import ModelError
from modulora_gguf.file.header import Header
from modulora_gguf.file.store import GGUFTensor

_FOR_ALL, _SHORT, _LONG = (
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)


def set_rope(config: Any, header: Header) -> None:
    """Complete ``config.rope_parameters`` by the header, and by the file's tensors of factors.

    Raises:
        ModelError: a scaling that transformers lacks, a field that isn't positive, or factors of
            another number.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    rope = rope.get("full_attention", rope)  # Gemma 3 has another one for its windows
    architecture = header.text("general.architecture")

    def field(name: str, default: Any = None) -> Any:
        found = header.fields.get(f"{architecture}.rope.{name}")
        value = default if found is None else found.value
        is_number = type(value) in (int, float) and (value > 0 or name == "scaling.factor")
        if name != "scaling.type" and not is_number:
            raise ModelError(f"rope.{name}: expected a positive number, got {value!r:.40}")
        return value

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = field("dimension_count", head_dim)
    rope["rope_theta"] = field("freq_base", rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = size / head_dim
    elif size != head_dim:
        raise ModelError(f"rope.dimension_count: expected a head's {head_dim}, got {size}")
    original = field("scaling.original_context_length", config.max_position_embeddings)
    kind, factor = field("scaling.type", "linear"), field("scaling.factor", 1.0)
    if factors := _factors(header, size // 2):
        rope |= {
            "rope_type": "longrope", "short_factor": factors[_SHORT], "long_factor": factors[_LONG],
            "attention_factor": field("scaling.attn_factor", 1.0),
            "original_max_position_embeddings": original,
        }  # fmt: skip
    elif kind in ("linear", "yarn") and factor not in (0, 1):
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
            rope["beta_fast"] = field("scaling.yarn_beta_fast", 32.0)
            rope["beta_slow"] = field("scaling.yarn_beta_slow", 1.0)
    elif kind not in ("linear", "yarn", "none"):
        raise ModelError(f"rope.scaling.type: expected none, linear or yarn, got {kind!r:.40}")


def _factors(header: Header, count: int) -> dict[str, list[float]]:
    """The factors of short and of long texts; empty if the file has none."""
    names = (_FOR_ALL, _SHORT, _LONG)
    found = {info.name: info for info in header.tensors if info.name in names}
    factors = {}
    for name, info in found.items():
        if info.shape != (count,):
            raise ModelError(f"{name}: expected {count} factors, got the shape {list(info.shape)}")
        factors[name] = GGUFTensor(info).read(as_stored=False).tolist()
    if _FOR_ALL in factors:
        return dict.fromkeys((_SHORT, _LONG), factors[_FOR_ALL])
    if len(factors) == 1:
        raise ModelError(f"expected both of {_SHORT} and {_LONG}, got {next(iter(factors))}")
    return factors
