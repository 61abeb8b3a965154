"""Keep vLLM's settings of a process and a quantizer's own apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def torch_defaults() -> Iterator[None]:
    """A block with torch's own defaults, in which quantizers make and cache their tables.

    vLLM loads a model within a block of its device, with the model's dtype as torch's default.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def keep_threads(product: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Run one product on a CPU, and restore OpenMP's number of threads.

    A quantizer's kernels start their threads at the first product, and change OpenMP's number. They
    restore it by ``torch.set_num_threads``, which vLLM's CPU worker has replaced by a warning.
    vLLM's attention then aborts, since its threads are more than it has scratch memory for.
    """
    if x.device.type != "cpu":
        return
    before = torch.get_num_threads()
    with torch_defaults():
        product(x)
    if torch.get_num_threads() != before:
        torch._C.set_num_threads(before)
