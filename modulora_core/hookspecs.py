"""The one hook that a plugin implements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from modulora_core.spec import QuantizerSpec

PROJECT = "modulora"
"""The name of pluggy's project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def modulora_quantizers() -> list[QuantizerSpec]:  # type: ignore[empty-body]  # a hookspec
    """Return the quantizers of this package.

    Import nothing heavy here: this runs on every ``modulora`` command, and torch takes seconds.
    """
