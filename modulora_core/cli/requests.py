"""Refuse a wrong place in a request at once: its command imports torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_places(given: Mapping[str, Any]) -> None:
    """Look for what a command was given as MODEL, ADAPTER or SOURCE, by the argument's name.

    Raises:
        RequestError: nothing is there, as the command itself would say later.
    """
    from modulora_core.data.sources import check_source
    from modulora_core.errors import ModelError
    from modulora_core.models.folders import no_config
    from modulora_core.models.locate import find_adapter, locate

    for name in ("model", "original", "source", "path"):
        if given.get(name) is not None:
            place = locate(given[name])
            whole = place.file is not None or (place.folder / "config.json").exists()
            if not whole and name in ("model", "original"):  # others may be adapters
                raise ModelError(no_config(place.folder))
    if given.get("adapter") is not None:
        find_adapter(given["adapter"])
    for name in ("data", "eval_data", "calibration"):
        found = given.get(name) or ()
        for source in (found,) if isinstance(found, str) else found:
            check_source(source)
