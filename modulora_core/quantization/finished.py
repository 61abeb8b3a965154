"""Recognize an output folder that the same request has finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modulora_core.checkpoints.checkpoint import open_checkpoint
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.errors import RequestError


def finished(out: Path) -> PackedCheckpoint | None:
    """The whole packed checkpoint in ``out``; None if there is something else."""
    if not (out / "config.json").is_file():
        return None
    try:
        found = open_checkpoint(out)
        found.check_whole()
    except RequestError:
        return None
    return found


def is_of(done: PackedCheckpoint, request: Mapping[str, Any]) -> bool:
    """Whether a request for a quantizer or for a budget made a checkpoint.

    Another version of this package may have made it.
    """
    record = done.record.to_json()
    recorded = {**record, **(record.get("allocation") or {})}
    chosen = {"weights", "kept"} if "budget" in request else set()  # a budget chooses them
    compared = {*request, *(record if "budget" not in request else ())}
    compared -= {*chosen, "core_version", "max_shard_bytes"}
    before, now = ({key: each.get(key) for key in compared} for each in (recorded, request))
    return json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True)
