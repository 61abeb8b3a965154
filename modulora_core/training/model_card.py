"""The README.md of a finetuned adapter, as the Hub shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import modulora_core
from modulora_core.adapters.scales_format import SCALES_FILE
from modulora_core.checkpoints.checkpoint import PackedCheckpoint
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.losses import loss_in_words

_PLAIN = "The files are PEFT's. With the quantized model:"
_WITH_SCALES = (
    f"A and B are in PEFT's files; the channel scales are in {SCALES_FILE}, which PEFT warns that it leaves out: "
    "with it alone the model is another one. `modulora merge` writes all of it into the weights. With the quantized model:"
)


def model_card(
    config: FinetuneConfig,
    checkpoint: PackedCheckpoint,
    losses: Sequence[float],
    eval_loss: float | None,
    *,
    channel_scales: bool = False,
) -> str:
    """Markdown with the Hub's metadata: base, data, settings, losses, and how to use it.

    With ``channel_scales`` it says that PEFT alone leaves them out.
    """
    base = str(checkpoint.record.source.get("name") or checkpoint.name)
    recipes = ", ".join(recipe.quantizer for recipe in checkpoint.record.recipes)
    held_out = (
        [] if eval_loss is None else [f"Loss on {_joined(config.eval_data)}: {eval_loss:.4f}."]
    )
    lines = [
        *_metadata(checkpoint, base, channel_scales),
        "",
        f"# A LoRA adapter for {base}",
        "",
        f"Trained by modulora-core {modulora_core.__version__} on {base}, quantized with {recipes} "
        f"({checkpoint.record.bits_per_weight:.2f} bits per weight).",
        "",
        f"Data: {_joined(config.data)}. {loss_in_words(losses).capitalize()}.",
        *held_out,
        "",
        "| setting | value |",
        "|-|-|",
        *(f"| {name} | {value} |" for name, value in _settings(config)),
        "",
        _WITH_SCALES if channel_scales else _PLAIN,
        "",
        "    modulora chat MODEL --adapter FOLDER",
        "",
    ]
    return "\n".join(lines)


def _metadata(checkpoint: PackedCheckpoint, base: str, channel_scales: bool) -> list[str]:
    # the Hub links base_model to a repository of its own, so a name of this machine doesn't belong there
    on_hub = checkpoint.record.source.get("kind") == "hub"
    base_model = [f"base_model: {json.dumps(base)}"] if on_hub else []
    # the Hub shows how to load it with the library
    library = [] if channel_scales else ["library_name: peft"]
    return [
        "---",
        *library,
        *base_model,
        "pipeline_tag: text-generation",
        "tags:",
        "- lora",
        "- modulora",
        "---",
    ]


def _settings(config: FinetuneConfig) -> list[tuple[str, object]]:
    told_above = {"model", "out", "data", "eval_data"}
    values = config.model_dump(mode="json", exclude_none=True, exclude=told_above)
    return [
        (name, ", ".join(value) if isinstance(value, list) else value)
        for name, value in values.items()
    ]


def _joined(sources: tuple[str, ...] | None) -> str:
    return ", ".join(sources or ())
