"""What torch.compile leaves alone. Importing this module imports the compiler, which takes seconds: only code that is being compiled
imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *arguments: Any) -> Tensor:
    """``function(*arguments)`` as one step between two compiled graphs, in forward and backward."""
    result: Tensor = function(*arguments)
    return result
