"""Keep compiled kernels on disk, and survive a cache that can't be read or written.

Importing this module imports numba.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from numba.core.caching import FunctionCache

logger = logging.getLogger(__name__)


class DiskCache(FunctionCache):
    """numba's cache on disk. A damaged or unwritable file costs a warning and a compilation."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # pickle raises anything for damaged bytes
            _warn("has a damaged file")
            with contextlib.suppress(OSError):
                self.flush()  # an index without entries
            return None
        if found is None:
            _tell()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(f"can't be written ({error.strerror})")


def cached(dispatcher: Any, function: Callable[..., Any]) -> Any:
    """Give numba's function for ``function`` a :class:`DiskCache`, if there is a folder for it."""
    with contextlib.suppress(RuntimeError):  # there is none
        dispatcher._cache = DiskCache(function)  # numba's enable_caching() puts its own there
    return dispatcher


@cache
def _tell() -> None:
    logger.info("compiling CPU kernels; this happens once, and later runs load them from disk")


@cache  # a damaged disk is no reason to warn for each kernel
def _warn(fault: str) -> None:
    warnings.warn(
        f"numba's cache on disk {fault}: kernels are compiled again, which takes seconds; delete "
        "its folder, __pycache__ beside the kernels, or let NUMBA_CACHE_DIR name another",
        RuntimeWarning,
        stacklevel=2,
    )
