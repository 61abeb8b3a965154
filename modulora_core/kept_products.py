"""Products with packed weights that gradient checkpointing keeps, so that a block's second forward doesn't multiply by them again.

Without, a step multiplies by each packed weight three times: in the forward, in the forward that checkpointing repeats, and in the
backward. What else a block computes costs little, and is made again from its products: selective recomputation (Korthikanti et al. 2022,
arXiv 2205.05198). A product is kept as it is, or rounded to a byte a value (:mod:`modulora_core.blockwise`): then gradients are of a
block whose products were rounded so, and the loss is exact.

Torch's own selective checkpointing keeps results of torch's operators. A product is made by a quantizer, and torch sees parts of it at
most. So a layer multiplies by :func:`product_or`, and says :func:`keep` afterwards. :class:`Making` surrounds a block's first forward, and
:class:`Repeating` those after it (:mod:`modulora_core.recomputation`).

Most blocks end with a product that is added to their input, and no gradient needs its values: in a Llama they are a quarter of the
multiplications. So in the second forward zeros stand for a block's last product. Where something behind it is saved for the backward,
that forward was in vain, and last products are needed from then on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from modulora_core.blockwise import Blockwise

Form = Literal["none", "exact", "rounded"]


class KeptProducts:
    """How a model's products are kept.

    Args:
        form: ``"exact"``, in the dtype of the activations; ``"rounded"``, as :class:`Blockwise` has them; or ``"none"``.

    Attributes:
        needs_last: whether the values of a block's last product are needed. None until a block was repeated; it is kept so long.
    """

    def __init__(self, form: Form) -> None:
        self._form = form
        self.needs_last: bool | None = None

    def keep(self, product: Tensor) -> tuple[Tensor, ...]:
        """The tensors to keep for ``product``."""
        if self._form == "rounded":
            coded = Blockwise.quantize(product)
            return coded.codes, coded.scales
        return (product,) if self._form == "exact" else ()

    def again(self, kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The product for which :meth:`keep` gave ``kept``."""
        if self._form == "rounded":
            codes, scales = kept
            return Blockwise(codes, scales, dtype).dequantize()
        return kept[0]


class _Block(AbstractContextManager["_Block"], ABC):
    """What the layers find that run in it."""

    def __enter__(self) -> Self:
        self._before = _current_block.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _current_block.reset(self._before)

    @abstractmethod
    def product_or(self, make: Callable[[], Tensor]) -> Tensor: ...

    @abstractmethod
    def keep(self, product: Tensor, *, is_needed: bool) -> None: ...


_current_block: ContextVar[_Block | None] = ContextVar("current_block", default=None)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a block's products, in their order, but for the tensors that are kept of them.

    Attributes:
        kept: of each product its dtype, and how many tensors are kept; none of one that was written to, which is made again.
        last: number, shape, dtype and device of the last one; None where its values are needed for sure.
    """

    kept: tuple[tuple[torch.dtype, int], ...]
    last: tuple[int, torch.Size, torch.dtype, torch.device] | None


class Making(_Block):
    """The first forward of a block runs in it."""

    def __init__(self, products: KeptProducts) -> None:
        self._products = products
        self._kept: list[tuple[torch.dtype, tuple[Tensor, ...], int]] = []
        self._latest: tuple[Tensor, int, bool] | None = None

    def product_or(self, make: Callable[[], Tensor]) -> Tensor:
        return make()

    def keep(self, product: Tensor, *, is_needed: bool) -> None:
        self._keep_latest()
        self._latest = product, product._version, is_needed

    def _keep_latest(self) -> None:
        """Not before the next one is made, or the block ends: until then its own layer's result may be written to."""
        if self._latest is None:
            return
        product, version, _ = self._latest
        kept = self._products.keep(product) if product._version == version else ()
        self._kept.append((product.dtype, kept, kept[0]._version if kept else 0))
        self._latest = None

    def record(self) -> tuple[list[Tensor], Record]:
        """At the end of the block: the tensors to keep until it is repeated, and what else there is to know."""
        last = None
        if self._latest is not None:
            product, _, is_needed = self._latest
            if not is_needed:
                last = len(self._kept), product.shape, product.dtype, product.device
            if is_needed or self._products.needs_last is not False:
                self._keep_latest()
        unwritten = [
            (dtype, kept if kept and kept[0]._version == version else ())
            for dtype, kept, version in self._kept
        ]
        tensors = [tensor for _, kept in unwritten for tensor in kept]
        return tensors, Record(tuple((dtype, len(kept)) for dtype, kept in unwritten), last)


class Repeating(_Block):
    """A later forward of a block runs in it.

    Args:
        tensors, record: what :meth:`Making.record` returned.

    Attributes:
        was_in_vain: something behind the last product was saved, and there were zeros in the place of that.
    """

    def __init__(self, products: KeptProducts, tensors: Sequence[Tensor], record: Record) -> None:
        self._products, self._record = products, record
        rest = iter(tensors)
        self._kept = [(dtype, [next(rest) for _ in range(count)]) for dtype, count in record.kept]
        self._next, self._watch = 0, ExitStack()
        self.was_in_vain = False

    def __exit__(self, *error: object) -> None:
        self._watch.close()
        super().__exit__(*error)
        self._products.needs_last = bool(self._products.needs_last)

    def product_or(self, make: Callable[[], Tensor]) -> Tensor:
        number, self._next = self._next, self._next + 1
        last = self._record.last
        if last is not None and number == last[0] and not self._products.needs_last:
            return self._zeros(*last[1:])
        if number < len(self._kept):
            dtype, kept = self._kept[number]
            if kept:
                return self._products.again(kept, dtype)
        return make()

    def _zeros(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        # what is saved from here on is saved in vain, and nobody asks for it
        self._watch.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._note, lambda _: torch.empty(0))
        )
        return torch.zeros(shape, dtype=dtype, device=device)

    def keep(self, product: Tensor, *, is_needed: bool) -> None:
        pass

    def _note(self, _: Tensor) -> None:
        self.was_in_vain = self._products.needs_last = True


def is_inside() -> bool:
    """Whether this runs in a block's forward, the first one or another."""
    return _current_block.get() is not None


def product_or(make: Callable[[], Tensor]) -> Tensor:
    """A layer's product: the kept one where a block is repeated, else what ``make()`` gives. It isn't to be written to."""
    block = _current_block.get()
    return make() if block is None else block.product_or(make)


def keep(product: Tensor, *, is_needed: bool = False) -> None:
    """Keep the product that a layer just made, in the first forward of a block that keeps them.

    Args:
        is_needed: the layer's own backward needs its values, so that a block's last product is kept too.
    """
    block = _current_block.get()
    if block is not None:
        block.keep(product.detach(), is_needed=is_needed)  # which counts what is written to either
