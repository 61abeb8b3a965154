"""End long work where it can be continued, after Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from modulora_core.distributed import add_up, world_size

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Work that ended after a signal, whose number is ``signal``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class Interruption:
    """Notes the first signal; the work asks for it. A second signal ends the work at once."""

    def __init__(self) -> None:
        self._signal = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note signals inside. Only the main thread can; in another nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal:
            raise Interrupted(number)
        self._signal = number

    def asked(self) -> bool:
        """Whether a signal came, to any process of the run. All processes call this together."""
        if world_size() > 1:
            import torch

            highest = torch.zeros(signal.NSIG, dtype=torch.int32)
            highest[self._signal] = 1
            add_up(highest)
            self._signal = int(highest.nonzero().max())
        return self._signal != 0

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self._signal:
            raise Interrupted(self._signal)
