"""Write the README.md of a finetuned adapter, as the Hub shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.models.folders import SCALES_FILE
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.loss_trend import loss_in_words
from modulora_core.version import VERSION

_PLAIN = "The files are in PEFT's format. With the quantized model:"
_WITH_SCALES = (
    f"A and B are in PEFT's files. The channel scales are in {SCALES_FILE}. PEFT warns and ignores "
    "them, so that its results differ; `modulora merge` writes all into the weights. "
    "With the quantized model:"
)


def model_card(
    config: FinetuneConfig,
    checkpoint: PackedCheckpoint,
    losses: Sequence[float],
    eval_loss: float | None,
    *,
    data: str,
    method: str = "",
    channel_scales: bool = False,
) -> str:
    """Markdown with the Hub's metadata: base, data, settings, losses, and usage.

    Args:
        method: how the method of training is described, after the name of this package.
    """
    record = checkpoint.record
    base = str(record.source.get("name") or checkpoint.name)
    quantizers = ", ".join(dict.fromkeys(group["quantizer"] for group in record.quantizers()))
    metadata = "pipeline_tag: text-generation\ntags: [lora, modulora]"
    if record.source.get("kind") == "hub":  # the Hub links it: not the name of a local folder
        metadata = f"base_model: {json.dumps(base)}\n{metadata}"
    if not channel_scales:  # the Hub shows how to load it with this library
        metadata = f"library_name: peft\n{metadata}"
    settings = config.model_dump(mode="json", exclude_none=True, exclude=set(config.private))
    rows = "\n".join(
        f"| {name} | {', '.join(value) if isinstance(value, list) else value} |"
        for name, value in settings.items()
    )
    evaluated = ""
    if eval_loss is not None:
        evaluated = (
            f"\nLoss on {', '.join(config.eval_data or ('evaluation records',))}: {eval_loss:.4f}."
        )
    return f"""---
{metadata}
---

# A LoRA adapter for {base}

Trained by modulora-core {VERSION}{method} on {base}, quantized with {quantizers}
({record.bits_per_weight:.2f} bits per weight).

Data: {data}. {loss_in_words(losses).capitalize()}.{evaluated}

| setting | value |
|-|-|
{rows}

{_WITH_SCALES if channel_scales else _PLAIN}

    modulora chat MODEL --adapter FOLDER
    modulora merge MODEL OUT --adapter FOLDER
"""
