"""The processes of a distributed run, as torchrun and ``accelerate launch`` start them.

Each process runs the same program. The first one, rank 0, writes files and prints. A bad request
must end all of them: :func:`together` lets them wait for each other at the end of their checks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from modulora_core.errors import ModuLoRAError, OptionError, RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: the first one may pack a model meanwhile."""


def world_size() -> int:
    """The number of processes of this run."""
    if are_connected():
        return sys.modules["torch.distributed"].get_world_size()  # type: ignore[no-any-return]
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """The number of this process, from 0."""
    if are_connected():
        return sys.modules["torch.distributed"].get_rank()  # type: ignore[no-any-return]
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def are_connected() -> bool:
    """Whether the processes of this run have met, as :func:`join` lets them."""
    distributed = sys.modules.get("torch.distributed")  # the command line starts without torch
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def join() -> None:
    """Connect to the other processes; this process takes the GPU of its local rank.

    Raises OptionError: torch can't connect them.
    """
    import torch
    from torch import distributed

    if world_size() == 1 or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    try:
        distributed.init_process_group(timeout=PATIENCE)  # gloo, and NCCL for GPUs
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OptionError(
            f"process {rank()} of {world_size()}: can't connect to the others: {reason}; start all "
            "with torchrun or accelerate launch"
        ) from error


def pick_device(name: str | None = None) -> torch.device:
    """The device called ``name``; without one ``"cuda"`` where there is one, else ``"cpu"``.

    Each process of a distributed run has a GPU of its own. Raises OptionError.
    """
    import torch

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


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        from torch import distributed

        join()
        distributed.barrier()


@contextmanager
def together() -> Iterator[None]:
    """Run a block in all processes. An error in one of them ends it in all.

    Raises ModuLoRAError.
    """
    try:
        yield
    except ModuLoRAError as error:
        agree(error)
    else:
        agree(None)


def agree(error: ModuLoRAError | None) -> None:
    """Tell the other processes the error of this one, and raise it, or the first of theirs.

    Each process calls this once; :attr:`ModuLoRAError.agreed` marks an error that all know.
    """
    if world_size() > 1 and not (error and error.agreed):
        from torch import distributed

        join()
        messages: list[Any] = [None] * world_size()
        distributed.all_gather_object(messages, None if error is None else str(error))
        failed = [number for number, message in enumerate(messages) if message is not None]
        if error is None and failed:
            first = failed[0]
            error = RequestError(f"process {first} of {world_size()}: {messages[first]}")
        if error is not None:
            error.agreed = True
    if error is not None:
        raise error


def shared_out(items: Sequence[Item]) -> Sequence[Item]:
    """This process's share of the items."""
    return items[rank() :: world_size()]


def merged(mine: dict[str, Item]) -> dict[str, Item]:
    """The entries of all processes; their values must pickle, as tensors on the CPU do."""
    if world_size() == 1:
        return mine
    from torch import distributed

    join()
    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def from_first(value: Item) -> Item:
    """The value that the first process has."""
    return merged({str(rank()): value})["0"]


def add_up(tensor: Tensor) -> None:
    """Replace the values of a tensor by their sums over all processes."""
    if world_size() > 1:
        from torch import distributed

        join()
        distributed.all_reduce(tensor)


def whole(tensor: Tensor) -> Tensor:
    """A parameter without its gradient; FSDP2's shards of it are gathered from all processes."""
    from torch.distributed.tensor import DTensor

    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def split_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole ``value``, if ``parameter`` is split so, else ``value``."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    placed = value.to(parameter.device)
    return distribute_tensor(
        placed, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
