"""Check the output folder of a run, and find the checkpoint to resume from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modulora_core.checkpoints.outputs import check_output, partial_name, write_file
from modulora_core.distributed import world_size
from modulora_core.errors import OptionError, OutputError
from modulora_core.models.folders import ADAPTER_CONFIG, RUN_FILE
from modulora_core.models.json_files import read_json
from modulora_core.training.checkpoints import latest_checkpoint, processes_of
from modulora_core.training.config import FinetuneConfig

CHECKPOINTS = "checkpoints"

_DIGESTS = "examples.json"
"""The file beside the checkpoints with the digests of the examples that they have seen."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """The part of a run that its output folder has.

    Attributes:
        finished: all of it; nothing is left to do.
        checkpoint: the checkpoint to resume from; None starts the run.
    """

    finished: bool = False
    checkpoint: Path | None = None


def check_new(out: Path) -> None:
    """Check the output folder of a run that may not resume. Raises OutputError."""
    if (out / ADAPTER_CONFIG).is_file():
        raise OutputError(f"{_finished(out)}; choose another name or remove it")
    if _last_checkpoint(out, resume=False) is not None:
        raise OutputError(
            f"output folder {out}: it holds an unfinished run; continue it with --resume, or "
            "remove it"
        )


def begun(out: Path, config: FinetuneConfig) -> Begun:
    """Find the part of a run that its output folder has, to resume it.

    Raises OutputError, OptionError.
    """
    if (out / ADAPTER_CONFIG).is_file():
        changed = ["another tool wrote it"]
        if (out / RUN_FILE).is_file():
            changed = config.differences(type(config).build({}, file=out / RUN_FILE))
        if changed:
            raise OutputError(
                f"{_finished(out)} of another run ({'; '.join(changed)}); to continue training, "
                f"choose another OUT and give --adapter {out}"
            )
        return Begun(finished=True)
    checkpoint = _last_checkpoint(out, resume=True)
    if checkpoint is None:
        return Begun()
    before = type(config).build({}, file=out / RUN_FILE)
    batches = [
        run.batch_size * run.grad_accum * processes
        for run, processes in ((before, processes_of(checkpoint)), (config, world_size()))
    ]
    if batches[0] != batches[1]:
        raise OptionError(
            f"resume of {out}: expected {batches[0]} examples a step (batch_size × grad_accum × "
            f"processes), got {batches[1]}; change grad_accum or the number of processes"
        )
    changed = config.differences(before)
    if changed:
        raise OptionError(
            f"resume of {out}: expected the options of {RUN_FILE}, got others: "
            f"{'; '.join(changed)}; to train with these, choose another OUT, or remove {out}"
        )
    logger.info("%s: resuming from %s", out, checkpoint)
    return Begun(checkpoint=checkpoint)


def _finished(out: Path) -> str:
    return f"output folder {out}: it holds a finished adapter"


def _last_checkpoint(out: Path, *, resume: bool) -> Path | None:
    """The last whole checkpoint; None if nothing would be lost, so that the run may start again.

    Raises OutputError: the folder holds other files than a run's.
    """
    if not (out / RUN_FILE).is_file():
        partial = partial_name(out / RUN_FILE)  # of a run that was killed while it wrote the file
        if not partial.is_file() or len(list(out.iterdir())) > 1:
            check_output(out.resolve())  # a run is written in its place, so a link may lead there
        return None
    checkpoint = latest_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:
        if not resume:
            _check_only_begun(out)
        logger.info("%s: starting again; the run in it left no whole checkpoint", out)
    return checkpoint


def check_examples(out: Path, examples: Mapping[str, Any], resume_from: Path | None) -> None:
    """Compare the examples of a run to resume with the ones that it began with.

    Raises OptionError: they differ, so that the run would mix two sets of data.
    """
    path = out / CHECKPOINTS / _DIGESTS
    if resume_from is None or not path.is_file():
        return
    before = read_json(path, dict[str, str])
    for name, digest in _digests(examples).items():
        if before.get(name) != digest:
            raise OptionError(
                f"resume of {out}: expected the {name} examples that the run began with, got "
                f"{len(examples[name])} others: the data or the tokenizer changed; restore them, "
                f"or choose another OUT; to go on with other data, give it --adapter {resume_from}"
            )


def record_examples(out: Path, examples: Mapping[str, Any]) -> None:
    """Write the digests that :func:`check_examples` reads."""
    (out / CHECKPOINTS).mkdir(exist_ok=True)
    write_file(out / CHECKPOINTS / _DIGESTS, json.dumps(_digests(examples)))


def _digests(examples: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of the examples of each source: tokens, or a preference's text."""
    return {
        name: hashlib.sha256(json.dumps(found).encode()).hexdigest()
        if isinstance(found, list)
        else found.digest
        for name, found in examples.items()
    }


def _check_only_begun(out: Path) -> None:
    """Refuse a folder with other files: the model card could replace one of them."""
    begun = {RUN_FILE, partial_name(Path(RUN_FILE)).name, CHECKPOINTS}
    others = sorted(path.name for path in out.iterdir() if path.name not in begun)
    if others:
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise OutputError(
            f"output folder {out}: expected no files except those of an unfinished run, found "
            f"{len(others)} ({some}); choose another name or remove them"
        )
