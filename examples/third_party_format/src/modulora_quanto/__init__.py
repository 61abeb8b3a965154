"""optimum-quanto's folders for ModuLoRA: the entry point, metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import FormatSpec, hookimpl


@hookimpl
def modulora_formats() -> list[FormatSpec]:
    return [
        FormatSpec(
            name="quanto",
            summary="optimum-quanto's qint8, as QuantizedModelForCausalLM saves it; only read",
            location="modulora_quanto.folder:Quanto",
            protocol=2,
            quant_methods=("quanto",),
            config_files=("quanto_qmap.json",),
        )
    ]
