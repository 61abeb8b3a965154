"""``modulora tasks``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import argument, option
from modulora_core.cli.terminal import Report
from modulora_core.cli.text import table

Tasks = Annotated[
    list[str], argument("TASK...", "Tasks of lm-evaluation-harness by name, or YAML files.")
]
IncludePath = Annotated[
    Path | None, option("--include-path DIR", "A folder of YAML files, whose tasks get names.")
]
FewShot = Annotated[
    int | None,
    option("--num-fewshot N", "Solved examples in a prompt.", min=0, default="the task's"),
]
Limit = Annotated[
    int | None, option("--limit N", "Only the first N examples of a task.", min=1, default="all")
]
BatchSize = Annotated[int, option("--batch-size N", "Answers or prompts in a pass.", min=1)]


def command(
    model: shared.Model,
    task: Tasks,
    adapter: shared.Adapter = None,
    include_path: IncludePath = None,
    num_fewshot: FewShot = None,
    limit: Limit = None,
    batch_size: BatchSize = 1,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    mapped: shared.Mapped = False,
    parity_check: shared.ParityCheck = True,
) -> Report:
    """Measure a packed or dense model on benchmark tasks, run by lm-evaluation-harness.

    A YAML file of a task may name Python functions beside it, which are run.

    Examples:
        modulora tasks smollm2-packed hellaswag arc_easy --limit 100
        modulora tasks smollm2-packed my-task.yaml --adapter my-adapter
    """
    from modulora_compare.tasks import evaluate_tasks
    from modulora_core.checkpoints.peak_memory import PeakMemory
    from modulora_core.inference.opened import open_to_run

    opened = open_to_run(
        model, adapter=adapter, dtype=dtype, device=device, mapped=mapped, parity_check=parity_check
    )
    started = time.perf_counter()
    with PeakMemory(opened.device) as peak:
        results = evaluate_tasks(
            opened, task, include_path=include_path, num_fewshot=num_fewshot, limit=limit,
            batch_size=batch_size,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    found = {
        "tasks": {name: asdict(result) for name, result in results.items()},
        "seconds": seconds,
        "peak_memory_bytes": peak.nbytes,
    }
    rows = [
        (name, metric, f"{value:.4f}", _margin(result.metrics, metric), str(result.examples or ""))
        for name, result in results.items()
        for metric, value in result.metrics.items()
        if "_stderr" not in metric
    ]
    return Report(found, table(("task", "metric", "value", "stderr", "examples"), rows))


def _margin(metrics: Mapping[str, float], metric: str) -> str:
    name, comma, answer_filter = metric.partition(",")
    value = metrics.get(f"{name}_stderr{comma}{answer_filter}")
    return "" if value is None else f"± {value:.4f}"
