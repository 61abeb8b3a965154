"""ModuLoRA: finetune quantized language models with any quantizer.

The public names are imported on first use: ``import modulora_core`` takes milliseconds and never torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Calibration": "modulora_core.spec",
    "FinetuneConfig": "modulora_core.training.config",
    "LoRALinear": "modulora_core.layers",
    "PackedLayout": "modulora_core.packed",
    "PackedWeight": "modulora_core.packed",
    "Promise": "modulora_core.spec",
    "QuantLinear": "modulora_core.layers",
    "Quantizer": "modulora_core.spec",
    "QuantizerSpec": "modulora_core.spec",
    "add_lora": "modulora_core.adapters.lora",
    "hookimpl": "modulora_core.hookspecs",
    "load_adapter": "modulora_core.adapters.lora",
    "load_model": "modulora_core.checkpoints.checkpoint",
    "save_adapter": "modulora_core.adapters.lora",
    "tile_budget": "modulora_core.tiles",
}
"""Each public name and the module that defines it; ``"module:other_name"`` where it has another name there.

A public name mustn't be a module's (``quantize``): importing that module would put it in the name's place.
"""

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604  # all of them are strings


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("modulora-core")
    except PackageNotFoundError:
        return "0+unknown"  # a source tree on the path, not installed
