"""Measure a model on tasks of lm-evaluation-harness, with the harness's prompts and metrics."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from modulora_core.arguments import checked
from modulora_core.data.rendering import check_ids
from modulora_core.errors import DataError, MissingExtraError, OptionError, first_line
from modulora_core.inference.opened import Runnable, tokenizer_and_loader
from modulora_core.progress import quiet


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of one task, or the mean of a group of tasks.

    Attributes:
        metrics: such as ``acc`` and ``acc_stderr``; with ``,NAME`` of an answer filter, if the task
            has one. Only numbers.
        examples: the number of examples; None for a group.
        num_fewshot: the solved examples in a prompt; None for a group.
    """

    metrics: Mapping[str, float]
    examples: int | None
    num_fewshot: int | None


@checked
def evaluate_tasks(
    model: Runnable,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    adapter: str | Path | None = None,
) -> dict[str, TaskResult]:
    """Measure a model on tasks of lm-evaluation-harness, as ``modulora tasks`` does.

    ::

        evaluate_tasks("smollm2-packed", ["hellaswag", "my-task.yaml"], limit=100)

    Args:
        model, adapter: as for :func:`modulora_evaluate.evaluate.evaluate`.
        tasks: names of tasks, groups or tags, or YAML files of tasks. A YAML file may name
            functions of a Python file beside it, which are run.
        include_path: a folder of YAML files, whose tasks get names.
        num_fewshot: solved examples in a prompt; by default each task's own number.
        limit: the first examples of each task only.
        batch_size: answers or prompts per forward pass.

    Returns:
        the result of each task and group, by name.

    Raises RequestError: a task, its data or the model can't be used, or lm-eval is missing.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise MissingExtraError(
            "tasks: expected the library lm-eval; pip install 'modulora-compare[tasks]'"
        ) from None
    least = {"limit": 1, "num_fewshot": 0, "batch_size": 1}
    for name, value in (("limit", limit), ("num_fewshot", num_fewshot), ("batch_size", batch_size)):
        if value is not None and value < least[name]:
            raise OptionError(f"{name}: expected at least {least[name]}, got {value}")
    for task in tasks:
        if _is_file(task) and not Path(task).is_file():
            raise OptionError(f"task {task}: no such file")
    if include_path is not None and not Path(include_path).is_dir():
        raise OptionError(f"include_path: expected a folder of YAML files, got {include_path}")
    tokenizer, load = tokenizer_and_loader(model, adapter)
    with _quiet():
        manager = _manager(include_path and str(include_path))
        loaded = [part for task in tasks for part in _load(manager, task)]
        lm = HFLM(pretrained=load(), tokenizer=tokenizer, batch_size=batch_size)
        with lm.model.get_input_embeddings().register_forward_pre_hook(_check_ids):
            found = simple_evaluate(
                lm,
                tasks=loaded,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
            )
    counts, shots = found["n-samples"], found["n-shot"]
    return {
        name: TaskResult(_numbers(values), counts.get(name, {}).get("effective"), shots.get(name))
        for name, values in (found["results"] | found.get("groups", {})).items()
    }


@cache
def _manager(include_path: str | None) -> Any:
    """The index of all tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _load(manager: Any, task: str) -> list[Any]:
    """Load the tasks of a name, or its group; their data too. Raises OptionError, DataError."""
    if not _is_file(task) and task not in manager.task_index:
        near = difflib.get_close_matches(task, manager.all_tasks, n=3)
        raise OptionError(
            f"task {task}: expected a name that `lm-eval ls tasks` lists, or a YAML file"
            f"{'; near: ' if near else ''}{', '.join(near)}"
        )
    try:
        found = manager.load(task)
    except Exception as error:  # YAML, datasets and the Hub's client raise their own
        raise DataError(
            f"task {task}: lm-evaluation-harness cannot load it or its data "
            f"({type(error).__name__}: {first_line(error)}); check its YAML file, its data files "
            "and the connection to the Hub"
        ) from error
    if found["groups"]:
        return [next(iter(found["groups"].values()))]  # a group comes before its parts
    return list(found["tasks"].values())


def _check_ids(embeddings: Any, inputs: tuple[Tensor, ...]) -> None:
    """Refuse tokens that the model lacks: an embedding fails on them, or reads other memory."""
    check_ids([int(inputs[0].max())], embeddings.num_embeddings, "tasks")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if key != "sample_len"  # the number of examples
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Let lm-eval and transformers log errors only."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)
