"""The machine: its devices, their memory, and the faster of torch's libraries."""

from __future__ import annotations

import torch

from modulora_core.errors import OptionError


def pick_device(name: str | None = None) -> torch.device:
    """The device called ``name``; without one ``"cuda"`` where there is one, else ``"cpu"``.

    Raises:
        OptionError: torch knows no such device, or can't use it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:  # torch builds without CUDA assert
        reason = str(error).strip().splitlines()[0]
        raise OptionError(
            f"device {name!r}: expected one that torch can use here, such as cpu; {reason}"
        ) from None
