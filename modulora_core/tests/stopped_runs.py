"""Ends runs as a kill does: of ``quantize`` after so many parameters, of ``finetune`` at a step."""

from pathlib import Path

import pytest

from modulora_core.checkpoints.shards import ShardWriter
from modulora_core.training.finetune import finetune


def stored(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Killed(BaseException):
    """Nothing of ours catches it."""


def stop(run, after, calls=((ShardWriter, "write"),)):
    """Run until ``after`` calls, by default parameters that were written, and no further."""
    count = 0

    def dying(call):
        def wrapped(*arguments):
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


def stop_finetune(config, step):
    """Run until a step. Returns the folder of the run's checkpoints."""

    def dying(taken):
        if taken.step == step:
            raise Killed

    with pytest.raises(Killed):
        finetune(config, on_step=dying)
    return Path(config.out) / "checkpoints"
