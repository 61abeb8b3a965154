"""ModuLoRA: finetune quantized language models with any quantizer.

The public names are imported on first use: ``import modulora_core`` takes milliseconds, and never
imports torch. ``import modulora_core.hf`` lets transformers' ``from_pretrained`` load our
checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; a test compares these imports with _PUBLIC
    from modulora_core.calibration import CalibrationConfig as CalibrationConfig
    from modulora_core.hf.hf_quantizer import ModuLoRAConfig as ModuLoRAConfig
    from modulora_core.hf.load_adapter import load_adapter as load_adapter
    from modulora_core.hf.load_model import load_model as load_model
    from modulora_core.hf.merge import merge as merge
    from modulora_core.hf.save_adapter import save_adapter as save_adapter
    from modulora_core.hookspecs import hookimpl as hookimpl
    from modulora_core.inference.generate import generate as generate
    from modulora_core.inference.opened import open_to_run as open_to_run
    from modulora_core.layers import LoRALinear as LoRALinear
    from modulora_core.layers import QuantLinear as QuantLinear
    from modulora_core.lora.adapting import add_lora as add_lora
    from modulora_core.lora.settings import LoRASettings as LoRASettings
    from modulora_core.models.generation import Sampling as Sampling
    from modulora_core.packed import PackedLayout as PackedLayout
    from modulora_core.packed import PackedWeight as PackedWeight
    from modulora_core.quantization.assignment import Assignment as Assignment
    from modulora_core.quantization.quantize import quantize as quantize
    from modulora_core.registry import Choice as Choice
    from modulora_core.spec import Calibration as Calibration
    from modulora_core.spec import Promise as Promise
    from modulora_core.spec import Quantizer as Quantizer
    from modulora_core.spec import QuantizerSpec as QuantizerSpec
    from modulora_core.tiles import tile_budget as tile_budget
    from modulora_core.training.config import FinetuneConfig as FinetuneConfig
    from modulora_core.training.finetune import finetune as finetune

    __version__: str

_PUBLIC = {
    "Assignment": "quantization.assignment",
    "Calibration": "spec",
    "CalibrationConfig": "calibration",
    "Choice": "registry",
    "FinetuneConfig": "training.config",
    "LoRALinear": "layers",
    "LoRASettings": "lora.settings",
    "ModuLoRAConfig": "hf.hf_quantizer",
    "PackedLayout": "packed",
    "PackedWeight": "packed",
    "Promise": "spec",
    "QuantLinear": "layers",
    "Quantizer": "spec",
    "QuantizerSpec": "spec",
    "Sampling": "models.generation",
    "add_lora": "lora.adapting",
    "finetune": "training.finetune",
    "generate": "inference.generate",
    "hookimpl": "hookspecs",
    "load_adapter": "hf.load_adapter",
    "load_model": "hf.load_model",
    "merge": "hf.merge",
    "open_to_run": "inference.opened",
    "quantize": "quantization.quantize",
    "save_adapter": "hf.save_adapter",
    "tile_budget": "tiles",
}
"""Each public name, and its module within this package."""

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604  # all of them are strings


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from modulora_core.version import VERSION

        return VERSION
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
