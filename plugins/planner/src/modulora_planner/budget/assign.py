"""Measures every layer's errors, divides a budget among the layers, and writes the assignment."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modulora_core.arguments import checked
from modulora_core.calibration import CalibrationConfig, block_prefixes, calibration_text
from modulora_core.calibration.states import spilled_bytes
from modulora_core.checkpoints.outputs import (
    check_disk_space,
    check_new_file,
    new_file,
    only_writer,
    write_file,
)
from modulora_core.distributed import pick_device, world_size
from modulora_core.errors import CheckpointError, OptionError, OutputError
from modulora_core.models import open_dense
from modulora_core.models.folders import REQUEST
from modulora_core.models.json_files import read_json
from modulora_core.models.system_errors import usable_path
from modulora_core.progress import Display, shown
from modulora_core.quantization.assignment import Assignment
from modulora_core.quantization.quality import Quality, calibration_of, choice_of
from modulora_core.registry import Choice
from modulora_planner.budget import yaml_text
from modulora_planner.budget.layer_errors import ERRORS_FILE, held_out_ids, measure_errors
from modulora_planner.budget.search import Budget, Search, Selection, open_search

logger = logging.getLogger(__name__)

SUFFIX = ".yaml"


@dataclass(frozen=True, slots=True)
class Assigned:
    """An assignment that was written.

    Attributes:
        file: its path. :func:`modulora_core.quantize` and people read it.
        table: its figures (:meth:`modulora_planner.budget.search.Search.solve`); None if the file
            was there already.
        calibrated: whether a quantizer of a layer wants a calibration.
    """

    file: str
    assignment: Assignment
    table: dict[str, Any] | None
    calibrated: bool

    def to_json(self) -> dict[str, Any]:
        asked = self.assignment
        choices = {"default": asked.default, "head": asked.head, "embeddings": asked.embeddings}
        listed = {name: None if each is None else asdict(each) for name, each in choices.items()}
        layers = {name: None if c is None else asdict(c) for name, c in asked.layers.items()}
        return {"file": self.file, "assignment": {**listed, "layers": layers}, "table": self.table}


@checked
def assign(
    model: str | Path,
    file: str | Path,
    budget: Budget,
    *,
    calibration: CalibrationConfig,
    quality: Quality = "balanced",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: Choice | str | None = None,
    embeddings: Choice | str | None = None,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    revision: str | None = None,
    progress: Display = True,
) -> Assigned:
    """Choose a quantizer for each layer of ``model`` within a budget, and write ``file``.

    The model is never whole in memory. Then :func:`modulora_core.quantize` packs it::

        text = CalibrationConfig("text.txt")
        budget = Budget(3 * 2**30, [Choice("NAME"), Choice("OTHER")])
        found = assign("org/model", "mixed.yaml", budget, calibration=text)
        quantize("org/model", "mixed", found.assignment, calibration=text)

    Args:
        model: a Hub id, a folder of safetensors, a file, or ``package:NAME``.
        file: a new ``.yaml`` file.
        budget: the bytes of all tensors, and the quantizers to choose from.
        calibration: the text on which errors are measured.
        quality: changes defaults of quantizers and of the calibration, as for ``quantize``.
        include, exclude: patterns of layers (fnmatch); the other layers are dense in the file.
        head, embeddings: quantizers of the output head and the input embedding.
        device: the torch device that packs; None takes a GPU if there is one.
        seed: for random numbers of quantizers and the choice of samples.
        resume: continue the same request after a killed run: layers that were measured are kept.
        revision: a branch, tag or commit of a Hub repository.
        progress: as for ``quantize``.

    Raises:
        RequestError: the request can't be fulfilled; nothing was written.
        WorkError: a layer's inputs or errors are NaN or Inf, or a quantizer failed.
    """
    model, where = os.fspath(model), pick_device(device)
    file = usable_path(file, "output file", OutputError)
    if world_size() > 1:
        raise OptionError(
            f"assign: expected one process, got {world_size()}; start it without torchrun"
        )
    if not (resume and file.is_file()):
        check_new_file(file, SUFFIX)
    with shown(progress, "reading", "bytes") as progress:
        source = open_dense(model, revision=revision)
        ends = Assignment(default=None, head=head, embeddings=embeddings)
        selection = Selection(include, exclude, ends.head, ends.embeddings)
        budget = replace(budget, choices=[choice_of(each, quality) for each in budget.choices])
        config = calibration_of(calibration, quality, budget.choices)
        assert config is not None, "there is a calibration"
        text = calibration_text(source, config, seed)
        search = open_search(source, budget, selection, text, seed=seed)
        source.check_whole()
        contents = source.checked_digest(progress)
        request = {**search.request, "contents": contents}
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if file.exists():
            return _finished(file, digest)
        check_disk_space(file, _disk_bytes(search, where))
        folder = file.with_name(f"{file.name}.measured")
        resumes = _check_begun(folder, request, resume=resume)
        with only_writer(folder):
            write_file(folder / REQUEST, json.dumps(request))
            errors = measure_errors(
                source, text, search.linears, search.quantizers,
                seed=seed, device=where, folder=folder, resume=resumes, progress=progress,
            )  # fmt: skip
            assignment, table = search.solve(errors)
            with new_file(file, SUFFIX) as unfinished:
                made = yaml_text.assignment_text(assignment, table, model, digest)
                unfinished.write_text(made, encoding="utf-8")
            for name in (REQUEST, ERRORS_FILE):
                (folder / name).unlink(missing_ok=True)
    return _assigned(file, assignment, table)


def _assigned(file: Path, assignment: Assignment, table: dict[str, Any] | None) -> Assigned:
    choices = [assignment.default, *assignment.layers.values()]
    calibrated = any(each is not None and each.create().wants_calibration for each in choices)
    return Assigned(str(file), assignment, table, calibrated)


def _finished(file: Path, digest: str) -> Assigned:
    """The assignment that a run of the same request wrote, and people may have edited."""
    found = Assignment.read(file)
    if f"{yaml_text.REQUEST}{digest}\n" not in file.read_text("utf-8"):
        raise OutputError(
            f"{file}: expected no file, or the assignment of the same request, got another one; "
            "choose another name, or remove it"
        )
    logger.info("%s: it is finished; nothing is left to resume", file)
    return _assigned(file, found, None)


def _check_begun(folder: Path, request: dict[str, Any], *, resume: bool) -> bool:
    """Whether there is an unfinished run of the same request to continue.

    Raises:
        OutputError: there is one and ``resume`` is False, or the folder is not ours.
        CheckpointError: the run has another request.
    """
    begun = folder / REQUEST
    if folder.exists() and not begun.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"temporary folder {folder}: expected it free, found something else; remove or rename "
            "it"
        )
    if not begun.is_file():
        return False
    if not resume:
        raise OutputError(
            f"temporary folder {folder}: expected it free, it holds an unfinished run of assign; "
            "go on with it with --resume, or remove it"
        )
    before = read_json(begun, dict[str, Any], advice="remove the folder, and start again")
    changed = [key for key in request if request[key] != before.get(key)]
    if changed:
        raise CheckpointError(
            f"{folder}: an unfinished run of another request (differs in {', '.join(changed)}); "
            "ask for the same, or remove the folder to start again"
        )
    return True


def _disk_bytes(search: Search, device: torch.device) -> int:
    """The largest size of the files with hidden states."""
    text, config = search.calibration, search.source.config
    spill, states = text.config.spill, len(block_prefixes(search.source)) + 1
    measured = states * held_out_ids(text).numel()
    return spilled_bytes(text.ids.numel(), config, device, spill) + spilled_bytes(
        measured, config, device, spill is not False
    )
