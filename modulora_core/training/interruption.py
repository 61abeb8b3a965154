"""End long work where it can be continued, after Ctrl-C or SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.distributed import add_up, world_size
from modulora_core.models.sites import outermost_lists

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Work that ended after a signal, whose number is ``signal``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class Stopped(Interrupted):
    """Work that ended at a check, outside of the change that an optimizer step makes."""


class Interruption:
    """Notes the first signal; the work asks for it. A second signal ends the work at once."""

    def __init__(self) -> None:
        self._signal = 0

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Note signals inside, and ask for one before the forward and backward of each block.

        Only the main thread can; in another nothing changes. Several processes wait for each other
        in a block, so they ask between forward passes only, with :meth:`check`.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        lists = outermost_lists(model) if world_size() == 1 else []
        blocks = [block for path in lists for block in model.get_submodule(path).children()]
        hooks = [block.register_forward_pre_hook(self._at_block) for block in blocks]
        hooks += [block.register_forward_hook(self._after_block) for block in blocks]
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for hook in hooks:
                hook.remove()

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal:
            raise Interrupted(number)
        self._signal = number
        with suppress(RuntimeError):  # the signal came while this stream was written
            logger.warning(
                "%s: the run stops, and keeps its last whole step; a second signal stops it at "
                "once, without the steps since its last checkpoint",
                signal.Signals(number).name,
            )

    def _at_block(self, *_: Any) -> None:
        if self._signal:
            raise Stopped(self._signal)

    def _after_block(self, _: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self._at_block)  # its gradient comes before the block's backward

    def asked(self) -> bool:
        """Whether a signal came, to any process of the run. All processes call this together."""
        if world_size() > 1:
            highest = torch.zeros(signal.NSIG, dtype=torch.int32)
            highest[self._signal] = 1
            add_up(highest)
            self._signal = int(highest.nonzero().max())
        return self._signal != 0

    def check(self) -> None:
        """Raise Stopped if a signal came. All processes call this together."""
        if self.asked():
            raise Stopped(self._signal)
