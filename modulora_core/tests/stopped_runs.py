"""Ends runs of ``quantize`` as a kill does, after so many parameters were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from modulora_core.checkpoints.shards import ShardWriter


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Killed(BaseException):
    """Nothing of ours catches it."""


def stop(
    run: Callable[[], object],
    after: int,
    calls: Sequence[tuple[type, str]] = ((ShardWriter, "write"),),
) -> None:
    """Run until ``after`` calls, by default parameters that were written, and no further."""
    count = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count > after:
                raise Killed
            return call(*arguments)

        return wrapped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        for cls, name in calls:
            patch.setattr(cls, name, dying(getattr(cls, name)))
        run()
