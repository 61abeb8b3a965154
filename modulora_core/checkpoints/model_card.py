"""Write the README.md of a packed folder, as the Hub shows it."""

from __future__ import annotations

import json

from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.version import VERSION

FILE = "README.md"


def model_card(record: QuantizationRecord) -> str:
    """Markdown with the Hub's metadata: source, quantizers, dense parameters, and usage."""
    name = str(record.source.get("name") or "a model")
    metadata = "pipeline_tag: text-generation\ntags: [modulora, quantized]"
    if record.source.get("kind") == "hub":  # the Hub links it: not the name of a local folder
        base = f"base_model: {json.dumps(name)}\nbase_model_relation: quantized"
        metadata = f"{base}\n{metadata}"
    packed = record.quantizers()
    rows = "\n".join(
        f"| {group['quantizer']} | {group['weights']:,} | {json.dumps(dict(group['options']))} |"
        for group in packed
    )
    dense = "; ".join(f"{reason}: {len(names)}" for reason, names in record.kept.items())
    plugins = " ".join(dict.fromkeys(group["distribution"] for group in packed))
    return f"""---
{metadata}
---

# {name}, quantized

Quantized by modulora-core {VERSION} to {record.bits_per_weight:.2f} bits per
weight, scales included.

| quantizer | weights | options |
|-|-|-|
{rows}

Parameters that stay dense, by reason: {dense or "none"}.

Install `modulora-core {plugins}`, then load it with transformers:

    import modulora_core.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("FOLDER")

or finetune it:

    modulora finetune FOLDER my-adapter --data notes.txt
"""
