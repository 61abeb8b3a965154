"""Make the config of a GGUF file's model, by transformers' tables and the file's metadata."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from modulora_core.errors import ModelError
from modulora_core.models.system_errors import full_disk_named
from modulora_gguf.file.header import Header
from modulora_gguf.file.store import MIXTRAL
from modulora_gguf.file.tensors import FileTensor
from modulora_gguf.file.writer import without_vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LEFT_OUT = {
    "attention.key_length": "head_dim",
    "context_length": "n_positions",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}

_BIASES = {"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_up.bias": "mlp_bias"}
"""Tensors that mean a flag of a Llama-like config."""

_TOKENS = "tokenizer.ggml.tokens"

_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""The tokens that end an answer, by the fields ``tokenizer.ggml.<name>_token_id``."""

_REFUSED = {
    "deci": "it has no such model",
    "gemma4": "it leaves out sizes of the layers",
    **dict.fromkeys(("t5", "t5encoder", "umt5"), "it is no causal language model"),
}
"""Architectures of transformers' list that aren't read, and the reasons."""

_EXPERTS = ("num_experts", "num_local_experts")

_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Gemmas of 27B, whose scores llama.cpp scales by another number than 1 / √head_dim."""


_FOR_ALL, _SHORT, _LONG = (
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
)
"""Tensors of factors of the rotary frequencies."""


def gguf_config(header: Header) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config that transformers makes of the header, and its fields. Raises ModelError."""
    from transformers import AutoConfig, PretrainedConfig

    _check_layers(header)
    quick = header.architecture in _read_quickly()
    with TemporaryDirectory() as folder:
        light = header.path
        if not quick:
            light = Path(folder) / header.path.name
            with full_disk_named(light.parent):
                without_vocabulary(header, light)
        try:
            _check_architecture(header)
            values, _ = PretrainedConfig.get_config_dict(light.parent, gguf_file=light.name)
            if "vocab_size" not in values and (tokens := header.fields.get(_TOKENS)):
                values["vocab_size"] = tokens.value
            if quick:  # it saw the first part only
                names = {tensor.name for tensor in header.tensors}
                values["tie_word_embeddings"] = "output.weight" not in names
            _set_mixtral(values, header)
            config = AutoConfig.for_model(**values)
            _set_left_out(config, values, header)
            if not quick:
                set_rope(config, header)
        except Exception as error:
            # KeyError of a missing field, ValueError of an unknown architecture, ...
            known = ", ".join(sorted(_architectures() - {header.architecture}))
            raise ModelError(
                f"{header.path}: transformers can't read this GGUF file ({error}); it reads "
                f"{known}; give the safetensors of this model"
            ) from error
    return config, values


def _check_layers(header: Header) -> None:
    """Refuse more layers than tensors: building so many modules would not end."""
    field = header.fields.get(f"{header.architecture}.block_count")
    if field is None or (type(field.value) is int and 0 < field.value <= len(header.tensors)):
        return
    raise ModelError(
        f"{header.path}: block_count: expected a number of layers from 1 to the number of tensors, "
        f"{len(header.tensors)}, got {field.value!r:.80}"
    )


def _check_architecture(header: Header) -> None:
    if reason := _REFUSED.get(header.architecture):
        raise ModelError(reason)
    norms = header.fields.get("mamba.ssm.dt_b_c_rms")
    if norms is not None and norms.value:
        raise ModelError("it takes Falcon Mamba for Mamba, which has fewer norms")


def _set_mixtral(values: dict[str, Any], header: Header) -> None:
    """Make a Mixtral of a llama with experts, as llama.cpp's converter calls it."""
    experts = header.fields.get("llama.expert_count")
    if experts is not None and experts.value:
        values["model_type"], values["num_local_experts"] = MIXTRAL, experts.value
        values["num_experts_per_tok"] = header.fields["llama.expert_used_count"].value


def _set_left_out(config: PretrainedConfig, values: dict[str, Any], header: Header) -> None:
    """Set the sizes that transformers leaves at the default of the config's class."""
    architecture = header.architecture
    for key, name in _LEFT_OUT.items():
        field = header.fields.get(f"{architecture}.{key}")
        if field is not None and name not in values and hasattr(config, name):
            setattr(config, name, field.value)
    for tensor in header.tensors:
        if getattr(config, _BIASES.get(tensor.name, ""), None) is False:
            setattr(config, _BIASES[tensor.name], True)
    experts = header.fields.get(f"{architecture}.expert_count")
    if experts and experts.value and not any(hasattr(config, name) for name in _EXPERTS):
        raise ModelError(f"it has no {architecture} with {experts.value} experts")
    if (config.pad_token_id or 0) >= config.get_text_config().vocab_size:
        config.pad_token_id = None  # the class's, which a file without one has no row of
    _set_ends(config, header)
    if architecture == "falcon":
        _set_falcon(config, values["num_key_value_heads"], header)
    if architecture == "gpt-oss":
        config.sliding_window = header.fields["gpt-oss.attention.sliding_window"].value
        config.rope_parameters["truncate"] = False  # as in its config.json; no file says it
    if architecture in _LAYERS_OF_27B:
        is_27b = config.num_hidden_layers == _LAYERS_OF_27B[architecture]
        of_all_heads = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = of_all_heads if is_27b else config.head_dim


def _set_ends(config: PretrainedConfig, header: Header) -> None:
    """Name all end tokens of the file, of which transformers reads the first."""
    named = (header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS)
    size = config.get_text_config().vocab_size
    ids = [field.value for field in named if field is not None and field.value in range(size)]
    if len(set(ids)) > 1:
        config.eos_token_id = [*dict.fromkeys(ids)]


def _set_falcon(config: Any, groups: int, header: Header) -> None:
    """Set the layout of larger Falcons, in which several groups of queries have keys and values."""
    if groups < 1 or config.num_attention_heads % groups:
        raise ModelError(
            f"falcon.attention.head_count_kv: expected a divisor of {config.num_attention_heads} "
            f"heads, got {groups}"
        )
    if groups > 1:
        names = {tensor.name for tensor in header.tensors}
        config.new_decoder_architecture, config.num_kv_heads = True, groups
        config.num_ln_in_parallel_attn = 2 if "blk.0.attn_norm_2.weight" in names else 1


def set_rope(config: Any, header: Header) -> None:
    """Complete ``config.rope_parameters``, of which transformers reads the base at most.

    llama.cpp divides the frequencies of a head by one factor (``linear``), by YaRN's factors, or by
    a tensor of factors. Llama 3.1 to 3.3 have one such tensor. Phi-3 with long contexts has two,
    for short and for long texts. transformers' LongRoPE takes any of them.

    Raises:
        ModelError: a scaling that transformers lacks, a field that isn't positive, or factors of
            another number.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    rope = rope.get("full_attention", rope)  # Gemma 3 has another one for its windows
    architecture = header.architecture

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
        factors[name] = FileTensor(info).read(as_stored=False).tolist()
    if _FOR_ALL in factors:
        return dict.fromkeys((_SHORT, _LONG), factors[_FOR_ALL])
    if len(factors) == 1:
        raise ModelError(f"expected both of {_SHORT} and {_LONG}, got {next(iter(factors))}")
    return factors


def _read_quickly() -> Collection[str]:
    """The architectures whose config transformers reads without the gguf package."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    return tuple(GGUF_CONFIG_ARCHS)


def _architectures() -> set[str]:
    """The architectures that transformers reads from a GGUF file, in either way."""
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    sections = {"general", "tokenizer"}  # of all architectures
    return {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS} - sections - _REFUSED.keys()
