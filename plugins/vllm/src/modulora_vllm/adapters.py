"""Check adapters against the model that is served, and write them as vLLM takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.errors import AdapterError, OptionError
from modulora_core.hf.peft_format import read_adapter
from modulora_core.models import ModelSource
from modulora_vllm.export import export_for_vllm

_NAME = re.compile(r"[\w.-]+")


def parse(words: Sequence[str]) -> dict[str, str]:
    """The path or Hub id of each adapter by its name, from ``NAME=ADAPTER``.

    Raises:
        OptionError: words of another form, or a name that comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (equals and path and _NAME.fullmatch(name)):
            raise OptionError(f"--adapter: expected NAME=ADAPTER, got {word!r}")
        if name in found:
            raise OptionError(f"--adapter: expected each name once, got {name!r} twice")
        found[name] = path
    return found


def prepare(
    adapters: Mapping[str, str], opened: PackedCheckpoint | ModelSource, model: str, folder: Path
) -> tuple[dict[str, str], int, list[str]]:
    """Write each adapter into ``folder`` as vLLM takes it.

    Args:
        adapters: paths or Hub ids by name.
        opened: the model that is served; model: its name.

    Returns:
        the folder of each by its name, the largest rank, and warnings.

    Raises:
        AdapterError: an adapter doesn't fit the model, or has channel scales.
    """
    ready: dict[str, str] = {}
    warnings, largest = list[str](), 1
    for name, path in adapters.items():
        saved = read_adapter(path)
        if isinstance(opened, PackedCheckpoint):
            exported = export_for_vllm(path, folder / name, model=model)  # compares the bases
            ready[name], largest = exported.out, max(largest, exported.rank)
            if saved.record is None:
                warnings.append(
                    f"adapter {name}: it has no record of its base, {saved.base_name} by its "
                    f"config; if it was trained on dense weights, each layer of {model} is off by "
                    "what quantization changed"
                )
            continue
        if saved.has_channel_scales:
            raise AdapterError(
                f"adapter {path}: expected A and B only, got channel scales, which vLLM doesn't "
                f"know; write the model with both by `modulora merge PACKED OUT --adapter {path}`"
            )
        if saved.record is not None and saved.record.base.quantizers:
            names = ", ".join(each["quantizer"] for each in saved.record.base.quantizers)
            warnings.append(
                f"adapter {name}: trained on weights quantized with {names}, and {model} is dense: "
                "each layer is off by what quantization changed; serve the packed folder"
            )
        ready[name], largest = str(saved.folder), max(largest, *saved.ranks)
    return ready, largest, warnings
