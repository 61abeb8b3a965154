"""Check the output folder of a run, and find the checkpoint to resume from."""

from __future__ import annotations

import logging
from pathlib import Path

from modulora_core.adapters.peft_format import CONFIG_FILE
from modulora_core.checkpoints.written.outputs import check_output, partial_name
from modulora_core.distributed import world_size
from modulora_core.errors import OptionError, OutputError
from modulora_core.models.folders import RUN_FILE
from modulora_core.training.checkpoints import latest_checkpoint, processes_of
from modulora_core.training.config import FinetuneConfig

CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


def check_out(out: Path, config: FinetuneConfig, resume: bool) -> Path | None:
    """Check the output folder.

    Returns:
        the checkpoint to resume from, or None to start.

    Raises:
        OutputError: the folder holds a finished adapter, other files, or, without ``resume``, an
            unfinished run with a whole checkpoint.
        OptionError: the run to resume has another config.
    """
    if (out / CONFIG_FILE).is_file():
        advice = (
            f"nothing is left to resume; to continue training, choose another OUT and give "
            f"--adapter {out}"
            if resume
            else "choose another name or remove it"
        )
        raise OutputError(f"output folder {out}: it holds a finished adapter; {advice}")
    if not (out / RUN_FILE).is_file():
        begun = partial_name(out / RUN_FILE)  # of a run that was killed while it wrote the file
        if not begun.is_file() or len(list(out.iterdir())) > 1:
            check_output(out)
        return None
    checkpoint = latest_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:  # nothing would be lost, so the run may start again
        if not resume:
            _check_only_begun(out)
        logger.info("%s: starting again; the run in it left no whole checkpoint", out)
        return None
    if not resume:
        raise OutputError(
            f"output folder {out}: it holds an unfinished run; continue it with --resume, or "
            "remove it"
        )
    before = FinetuneConfig.build({}, file=out / RUN_FILE)
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
    return checkpoint


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
