"""Run in a process of its own: do a job, and print what it took as one JSON object.

python planned_run.py training '{"model": ..., "out": ..., "rank": 8, ...}'

``peak`` is the largest resident set of the whole process, ``work`` the most that torch's operations held at once beside the weights.
Each job imports what its command imports, and nothing else: libraries take memory.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from modulora_core.devices.memory import Allocations, PeakMemory

Taken = Mapping[str, int]


def training(options: dict[str, Any]) -> Taken:
    """Two steps of ``modulora finetune``, unless ``options`` say how many."""
    from modulora_core.offload import DiskFile

    from modulora_core.training.adapter_trainer import AdapterTrainer
    from modulora_core.training.config import FinetuneConfig
    from modulora_core.training.finetune import finetune

    steps: list[int] = []
    step, keep = AdapterTrainer.training_step, DiskFile.keep

    def uncounted(self: DiskFile, tensor: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():  # it is on the disk
            return keep(self, tensor)

    def counted(self: Any, model: Any, *arguments: Any, **more: Any) -> Any:
        with Allocations([*model.parameters(), *model.buffers()]) as allocations:
            loss = step(self, model, *arguments, **more)
        steps.append(allocations.peak)
        return loss

    AdapterTrainer.training_step = counted  # type: ignore[method-assign]
    DiskFile.keep = uncounted  # type: ignore[method-assign]
    result = finetune(
        FinetuneConfig.build({"data": ["pydoc"], "steps": 2, "grad_accum": 1, **options})
    )
    return {"peak": result.peak_memory_bytes, "work": max(steps)}


def quantizing(options: dict[str, Any]) -> Taken:
    """``modulora quantize``; ``head`` is as ``--quantize-head`` has it, ``calibration`` the samples and their tokens."""
    from modulora_core.calibration import CalibrationConfig
    from modulora_core.quantization import quantize as module
    from modulora_core.registry import Choice

    model, out, quantizer = options["model"], options["out"], options["quantizer"]
    head = None if "head" not in options else Choice.parse(options["head"])
    text = None
    if "calibration" in options:
        samples, seq_len = options["calibration"]
        text = CalibrationConfig("pydoc", samples=samples, seq_len=seq_len)
    write = module.write_packed
    counted: list[int] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        with Allocations() as allocations:
            packed = write(*arguments, **more)
        counted.append(allocations.peak)
        return packed

    module.write_packed = watched
    result = module.quantize(
        model, out, quantizer, options.get("options"), head=head, calibration=text
    )
    return {"peak": result.peak_memory_bytes, "work": max(counted)}


def decoding(options: dict[str, Any]) -> Taken:
    """A prompt of ``prompt`` tokens and a few new ones."""
    from pydoc_data.topics import topics

    from modulora_core.inference.generate import Sampling, generate
    from modulora_core.inference.loading import open_to_run

    opened = open_to_run(
        options["model"], dtype=options.get("dtype", "auto"), mapped=options.get("mapped", False)
    )
    with PeakMemory() as peak:
        model, tokenizer = opened.load(), opened.tokenizer
        ids = tokenizer("\n".join(topics.values())).input_ids[: options["prompt"]]
        before = [*model.parameters(), *model.buffers()]
        with Allocations(before) as allocations:
            output = generate(model, tokenizer, tokenizer.decode(ids), Sampling(max_new_tokens=4))
    return {"peak": peak.nbytes, "work": allocations.peak, "prompt": output.prompt_tokens}


def compiled() -> bool:
    """Whether numba compiled something here that it had not kept: that takes memory, once on a machine."""
    if "numba" not in sys.modules:
        return False
    from numba.core.registry import CPUDispatcher

    kernels = [found for found in gc.get_objects() if isinstance(found, CPUDispatcher)]
    return any(kernel.stats.cache_misses for kernel in kernels)


JOBS: Mapping[str, Callable[[dict[str, Any]], Taken]] = {
    "training": training,
    "quantizing": quantizing,
    "decoding": decoding,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    taken = JOBS[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps({**taken, "compiled": compiled()}))
