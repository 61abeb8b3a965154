"""The optimizer's state in a checkpoint: whole, whatever number of processes shares it.

FSDP2 splits a parameter and its moments over the processes. A checkpoint has them whole, in the
file that transformers writes for one process. So any number of processes can resume it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modulora_core.distributed import is_first, split_like, whole

OPTIMIZER_FILE, SCHEDULE_FILE = "optimizer.pt", "scheduler.pt"


def save_optimizer(optimizer: Any, schedule: Any, folder: Path) -> None:
    """Write both states; all processes call it, and the first one writes."""
    state = _mapped(optimizer, lambda value, _: whole(value).cpu())
    if is_first():
        torch.save(state, folder / OPTIMIZER_FILE)
        torch.save(schedule.state_dict(), folder / SCHEDULE_FILE)


def load_optimizer(optimizer: Any, schedule: Any, folder: Path) -> None:
    """Read both states; each process takes its part."""
    stored = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)

    def part(value: Tensor, parameter: Tensor) -> Tensor:
        return split_like(value, parameter) if value.shape == parameter.shape else value

    optimizer.load_state_dict(_mapped(optimizer, part, stored))
    schedule.load_state_dict(torch.load(folder / SCHEDULE_FILE, weights_only=True))


def _mapped(
    optimizer: Any, change: Callable[[Tensor, Tensor], Tensor], stored: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A state with each of its tensors changed; ``change`` also gets the tensor's parameter."""
    state = optimizer.state_dict() if stored is None else stored
    parameters = dict(enumerate(_parameters(optimizer)))
    moments = {
        number: {
            name: change(value, parameters[number]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
