"""Products with packed weights that gradient checkpointing keeps, so that a block's second forward doesn't multiply by them again.

Without, a step multiplies by each packed weight three times: in the forward, in the forward that checkpointing repeats, and in the
backward. What else a block computes costs little, and is made again from its products: selective recomputation (Korthikanti et al. 2022,
arXiv 2205.05198). A product is kept as it is, or rounded to a byte a value (:mod:`modulora_core.blockwise`): then gradients are of a
block whose products were rounded so, and the loss is exact.

Torch's own selective checkpointing keeps results of torch's operators. A product is made by a quantizer, and torch sees parts of it at
most.

:class:`KeptProducts` tells torch's checkpointing what surrounds a block's two forwards. A layer multiplies by :func:`product_or`, and says
:func:`keep` afterwards. A block's last product is kept no more once a whole backward has asked for none: most blocks end with one that they
need no more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Literal

from torch import Tensor

from modulora_core.blockwise import Blockwise
from modulora_core.offload import Place

Form = Literal["exact", "rounded"]


class KeptProducts:
    """What ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint` takes: each call is for one forward of one block.

    Args:
        form: ``"exact"``, in the dtype of the activations, or ``"rounded"``, as :class:`Blockwise` has them.
        place: where they wait; None for the memory that they are in.

    Attributes:
        with_last: whether a block's last product is kept too. It is known when the second step begins, and changes no value.
    """

    def __init__(self, form: Form, place: Place | None = None) -> None:
        self._form, self._place = form, place
        self.with_last = True
        self._repeats = self._needs_last = False

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What the forward runs in, and its repetition."""
        if self._repeats and not self._needs_last:  # a step was made, and this is the next one's
            self.with_last = False
        block = _Block(self)
        return _Within(block, replays=False), _Within(block, replays=True)

    def kept(self, product: Tensor) -> Callable[[], Tensor | None]:
        """How to have ``product`` again, as often as wanted; None where it was written to since."""
        if self._form == "rounded":
            coded = Blockwise.quantize(product)
            codes, scales, dtype = self._away(coded.codes), coded.scales, coded.dtype
            # not coded itself, whose codes would stay where they are too
            return lambda: Blockwise(codes(), scales, dtype).dequantize()
        if self._place is not None:
            return self._away(product)
        version = product._version
        return lambda: product if product._version == version else None

    def note(self, *, last: bool) -> None:
        """That a block was repeated, and whether it asked for its last product."""
        self._repeats = True
        self._needs_last |= last

    def _away(self, tensor: Tensor) -> Callable[[], Tensor]:
        if self._place is None:
            return lambda: tensor
        place, device, parked = self._place, tensor.device, self._place.keep(tensor)

        def back() -> Tensor:
            brought = parked.to(device, copy=True)
            place.drop(parked)
            return brought

        return back


class _Within(AbstractContextManager[None]):
    """Has the layers that run inside find their block. It may be entered again: a graph that is kept goes back more than once."""

    def __init__(self, block: _Block, *, replays: bool) -> None:
        self._block, self._replays = block, replays

    def __enter__(self) -> None:
        self._block.begin(replays=self._replays)
        self._before = _current_block.set(self._block)

    def __exit__(self, *error: object) -> None:
        _current_block.reset(self._before)
        self._block.end()


class _Block:
    """The products of one forward of a block, in their order, which is that of its repetition.

    In the place of a product that was written to is one that is not there: it is made again.
    """

    def __init__(self, owner: KeptProducts) -> None:
        self._owner = owner
        self._products: list[Callable[[], Tensor | None]] = []
        self._latest: tuple[Tensor, int] | None = None
        self._count = self._next = 0
        self.is_replayed = False

    def begin(self, *, replays: bool) -> None:
        self._next, self.is_replayed = 0, replays

    def end(self) -> None:
        if self.is_replayed:
            self._owner.note(last=0 < self._next == self._count)
        else:
            self._keep_latest(at_end=True)

    def add(self, product: Tensor) -> None:
        self._keep_latest()
        self._latest, self._count = (product, product._version), self._count + 1

    def _keep_latest(self, *, at_end: bool = False) -> None:
        if self._latest is None:
            return
        product, version = self._latest
        self._latest = None
        if product._version != version:
            self._products.append(lambda: None)
        elif self._owner.with_last or not at_end:
            self._products.append(self._owner.kept(product))

    def product_or(self, make: Callable[[], Tensor]) -> Tensor:
        number, self._next = self._next, self._next + 1
        product = self._products[number]() if number < len(self._products) else None
        return make() if product is None else product


_current_block: ContextVar[_Block | None] = ContextVar("current_block", default=None)


def product_or(make: Callable[[], Tensor]) -> Tensor:
    """A layer's product: the kept one where a block is repeated, else what ``make()`` gives. It isn't to be written to."""
    block = _current_block.get()
    return block.product_or(make) if block is not None and block.is_replayed else make()


def keep(product: Tensor) -> None:
    """Keep the product that a layer just made, in the first forward of a block that keeps them."""
    block = _current_block.get()
    if block is not None and not block.is_replayed:
        block.add(product.detach())  # which counts what is written to either
