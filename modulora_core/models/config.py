"""Reading a folder's config.json, and refusing what can't be quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modulora_core.errors import ModelError
from modulora_core.hookspecs import PROJECT
from modulora_core.models.formats import FormatSpec, recognise, specs
from modulora_core.models.unfinished import MARKER, REQUEST, RUN_FILE

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_config(
    folder: Path, foreign: FormatSpec | None = None
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of a folder, and what its config.json says.

    No code of the folder is run.

    Args:
        folder: of floating-point weights, unless ``foreign`` is given.
        foreign: the format that :func:`modulora_core.models.formats.recognise` knows the folder by; the config is then that of
            its model without quantization.

    Raises:
        ModelError: no config.json, a broken one, one that needs remote code, or one of a quantized model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(no_config(folder))
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if foreign is None:
        _refuse_quantized(folder, values)

    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config class checks its fields in its own way
        reason = str(error).strip().split("\n")[0]
        remote = "; it needs code of its own, which is never run" if "auto_map" in values else ""
        raise ModelError(f"{path}: transformers can't use this config{remote}: {reason}") from error
    if foreign is not None:
        for part in (config, config.get_text_config()):
            for key in ("quantization_config", *foreign.config_keys):
                if hasattr(part, key):
                    delattr(part, key)
    return config, values


def no_config(folder: Path) -> str:
    """What a folder without config.json holds, and what to do, for a message."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder}: no config.json; the folder holds an adapter: give its base model, "
            f"and the adapter with --adapter where the command has it"
        )
    if (folder / RUN_FILE).is_file():
        return f"{folder}: an unfinished run of finetune; go on with it with --resume. The adapters that it saved are in checkpoints"
    if (folder / MARKER).is_file():
        on = (
            "go on with it with quantize and --resume"
            if (folder / REQUEST).is_file()
            else "run its command again"
        )
        return f"{folder}: an unfinished run, not a model; {on}"
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    if ggufs:
        return f"{folder}: no config.json; for a GGUF model give the file: {folder / ggufs[0]}"
    return f"{folder}: no config.json; expected a folder as transformers' save_pretrained writes it"


def _refuse_quantized(folder: Path, values: dict[str, Any]) -> None:
    known = recognise(folder, values)
    if known is not None:
        raise ModelError(
            f"{folder}: already quantized with {known.config.get('quant_method', known.spec.name)} ({known.file}); "
            f"expected floating-point weights. Give the original model to quantize it differently. This one is ready "
            f"for finetune, generate, chat, evaluate and merge as it is, and `{PROJECT} convert {folder} OUT --to {PROJECT}` "
            f"rewrites it"
        )
    text = values.get("text_config")
    for config in (values, text if isinstance(text, dict) else {}):
        found = config.get("quantization_config") or config.get("compression_config")
        if not found:
            continue
        method = (
            found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found
        )
        if method == PROJECT:
            raise ModelError(
                f"{folder}: already quantized by {PROJECT}; expected floating-point weights. It is "
                f"ready for finetune, generate, chat, evaluate and merge; to quantize it differently, "
                f"start from its original"
            )
        raise ModelError(unread_method(str(folder), method))


def unread_method(model: str, method: object) -> str:
    """That no plugin reads what ``model`` is quantized with, and what to do, for a message."""
    return (
        f"model {model}: quantized with {method}, which no installed plugin reads (formats: {', '.join(specs()) or 'none'}); "
        "install one that does, or give the original model"
    )
