"""Read a folder's config.json, and refuse a model that can't be quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from modulora_core.errors import ModelError, first_line
from modulora_core.hookspecs import PROJECT, QUANTIZATION_KEYS, FormatSpec
from modulora_core.models.folders import no_config
from modulora_core.models.installed_formats import method_of, recognise, unread_method
from modulora_core.models.json_files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MOST = {"num_hidden_layers": 512, "n_layer": 512, "num_layers": 512} | dict.fromkeys(
    ("experts", "num_experts", "num_local_experts", "n_routed_experts"), 4096
)
"""The largest counts in config.json: transformers makes a module or a list of so many."""


class _Ends(BaseModel):
    """The fields of generation_config.json that end an answer."""

    eos_token_id: int | list[int] | None = None


def config_values(folder: Path) -> dict[str, Any]:
    """The contents of config.json; empty if there is none. Raises ModelError: it is broken."""
    path = folder / "config.json"
    values = read_json(path, dict[str, Any], error=ModelError) if path.exists() else {}
    if (generation := folder / "generation_config.json").exists():
        read_json(generation, _Ends, error=ModelError)
    _check_counts(values, str(path))
    return values


def _check_counts(values: Any, subject: str) -> None:
    """Refuse a count of modules that would take all memory to build. Raises ModelError."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list)):
            _check_counts(value, f"{subject}: {key}" if isinstance(values, dict) else subject)
        elif isinstance(value, int) and value > (most := _MOST.get(str(key), value)):
            raise ModelError(f"{subject}: {key}: expected 0 to {most}, got {value}")


def read_config(
    folder: Path, foreign: FormatSpec | None = None
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of a folder as transformers makes it, and the contents of config.json.

    No code of the folder is run.

    Args:
        foreign: the format of a quantized folder
            (:func:`modulora_core.models.installed_formats.recognise`).
            The config is then that of its model without quantization.
    """
    values = config_values(folder)
    if not values:
        raise ModelError(no_config(folder))
    if foreign is None:
        _refuse_quantized(folder, values)
    config = transformers_config(folder)
    if foreign is not None:
        for part in (config, config.get_text_config()):
            for key in (*QUANTIZATION_KEYS, *foreign.config_keys):
                if hasattr(part, key):
                    delattr(part, key)
    return config, values


def transformers_config(folder: Path) -> PretrainedConfig:
    """The config that transformers makes of a folder. Raises ModelError."""
    from transformers import AutoConfig, GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # it checks its fields in many ways
            raise ModelError(
                f"{folder / 'generation_config.json'}: transformers can't use it: "
                f"{first_line(error)}; remove it, or correct the field"
            ) from error
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class checks its fields in its own way
        remote = "auto_map" in config_values(folder)
        code = "; it needs code of its own, which is never run" if remote else ""
        raise ModelError(
            f"{folder / 'config.json'}: transformers can't use this config{code}: "
            f"{first_line(error)}"
        ) from error


def window_of(config: PretrainedConfig) -> int | None:
    """The longest context of a model in tokens, or None if its config names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def vocabulary_of(config: PretrainedConfig) -> int:
    """The number of tokens that a model knows, which may be more than its tokenizer has."""
    return int(config.get_text_config().vocab_size)


def _refuse_quantized(folder: Path, values: dict[str, Any]) -> None:
    known, method = recognise(folder, values), method_of(values)
    rewrite = ""
    if known is not None:
        method = f"{known.config.get('quant_method', known.spec.name)} ({known.file})"
        rewrite = f"; `{PROJECT} convert {folder} OUT --to {PROJECT}` rewrites it"
    elif method not in (None, PROJECT):
        raise ModelError(unread_method(str(folder), str(method)))
    if method is not None:
        raise ModelError(
            f"{folder}: expected floating-point weights, got a model already quantized with "
            f"{method}. It is ready for finetune, generate, chat, evaluate and merge{rewrite}; to "
            "quantize it differently, give the original model"
        )
