"""Find a finished output folder, or continue an unfinished one of the same request."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import (
    SMALL_FILES,
    check_disk_space,
    check_output,
    partial_name,
    whole_or_nothing,
    write_file,
)
from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.checkpoints.record import QuantizationRecord
from modulora_core.distributed import barrier, from_first, is_first, together
from modulora_core.errors import CheckpointError, RequestError
from modulora_core.models import ModelSource
from modulora_core.models.folders import REQUEST
from modulora_core.models.json_files import read_json
from modulora_core.progress import Progress

logger = logging.getLogger(__name__)


class _Begun(BaseModel):
    """``request.json`` of an unfinished run; ``contents`` is the digest of the model's values."""

    record: dict[str, Any]
    contents: str | None = None


def finished(out: Path) -> PackedCheckpoint | None:
    """The whole packed checkpoint in ``out``; None if there is something else."""
    if not (out / "config.json").is_file():
        return None
    try:
        found = open_packed(out)
        found.check_whole()
    except RequestError:
        return None
    return found


def check_finished(
    done: PackedCheckpoint, record: QuantizationRecord, source: ModelSource, progress: Progress
) -> None:
    """Refuse a finished checkpoint of another request or other weights. Reads all values.

    Another version of this package may have written it. A checkpoint without a digest is accepted
    with a warning: older versions wrote none. Raises OutputError, CheckpointError, WeightError.
    """
    request = {"core_version": record.core_version, "contents": None}
    if done.record.model_copy(update=request).to_json() != record.to_json():
        check_output(done.path, resume=True)  # it refuses a folder with files
    if done.record.contents is None:
        logger.warning(
            "%s: an older version wrote it, without a digest of the model's values; they aren't "
            "compared",
            done.path,
        )
    elif done.record.contents != source.checked_digest(progress):
        raise CheckpointError(
            f"{done.path}: expected a checkpoint of {source.location.model}, got one of other "
            "weights; choose another name, or remove it"
        )
    logger.info("%s: it is finished; nothing is left to resume", done.path)


@contextmanager
def unfinished(
    source: ModelSource,
    out: Path,
    request: Mapping[str, Any],
    nbytes: int,
    resume: bool,
    progress: Progress,
) -> Iterator[tuple[Path, bool, str | None]]:
    """Open the folder of an unfinished run, which becomes ``out`` at the end.

    In a distributed run the first process makes it, and the others wait.

    Args:
        request: identifies the run; a resumed run must have the same.
        nbytes: the size of the files to write, without small ones.

    Yields:
        the folder, whether a run is continued, and in the first process the digest of the values.

    Raises CheckpointError, DiskSpaceError, WeightError.
    """
    with ExitStack() as stack:
        resumes, contents = False, None
        with together():
            if is_first():
                before = _begun(partial_name(out), request) if resume else None
                check_disk_space(out, nbytes + SMALL_FILES)
                source.check_whole()
                contents = source.checked_digest(progress)
                if before is not None and before.contents not in (None, contents):
                    raise _another(partial_name(out), "the values of the model's weights")
                resumes = before is not None
                folder = stack.enter_context(whole_or_nothing(out, resume=resumes))
                source.copy_tokenizer(folder)  # one that can't be copied is refused before the work
                begun = json.dumps({"record": request, "contents": contents})
                write_file(folder / REQUEST, begun)
        yield partial_name(out), from_first(resumes), contents
    barrier()  # out is whole


def _begun(folder: Path, request: Mapping[str, Any]) -> _Begun | None:
    """The unfinished run of the same request in ``folder``, if there is one."""
    if not (folder / REQUEST).is_file():
        return None
    before = read_json(folder / REQUEST, _Begun, advice="remove the folder, and start again")
    changed = [key for key in request if request[key] != before.record.get(key)]
    if changed:
        raise _another(folder, ", ".join(changed))
    return before


def _another(folder: Path, difference: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: an unfinished run of another request (differs in {difference}); ask for the "
        "same, or remove the folder to start again without --resume"
    )
