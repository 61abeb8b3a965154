"""Ends runs of ``quantize`` as a kill does, after so many parameters were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modulora_core.checkpoints.written.shards import ShardWriter
from modulora_core.quantization.mixed.errors import _Measuring


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Killed(BaseException):
    """Nothing of ours catches it."""


def stop(run: Callable[[], object], after: int) -> None:
    """Run until ``after`` layers were measured or parameters written, and no further."""
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
        patch.setattr(ShardWriter, "write", dying(ShardWriter.write))
        patch.setattr(_Measuring, "pack", dying(_Measuring.pack))
        run()
