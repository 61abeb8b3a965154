"""The machine: its devices and processes, their memory, and the faster of torch's libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modulora_core.errors import OptionError

if TYPE_CHECKING:
    import torch


def pick_device(name: str | None = None) -> torch.device:
    """The device called ``name``; without one ``"cuda"`` where there is one, else ``"cpu"``.

    Each process of a distributed run has a GPU of its own.

    Raises:
        OptionError: torch knows no such device, or can't use it here.
    """
    import torch

    from modulora_core.devices.processes import local_rank, world_size

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{local_rank()}"
    try:
        made = torch.empty(1, device=name)
        made.cpu()  # tensors on meta have no values
    except Exception as error:  # torch builds without a backend assert, import, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionError(
            f"device {name!r}: expected one that torch can use here, such as cpu; {reason}"
        ) from None
    return made.device
