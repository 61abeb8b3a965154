"""Do a job in a process of its own, and print its peak memory as one JSON object.

python planned_run.py training '{"model": ..., "out": ..., "rank": 8, ...}'

``peak`` is the largest resident set of the process. ``work`` is the most that torch's operations
held at once beside the weights. A job imports only what its command imports.
"""

import json
import sys

import torch
from modulora_conformance.allocations import Allocations

from modulora_core.checkpoints.peak_memory import PeakMemory


def training(options):
    """Run two steps of ``modulora finetune``, or as many as ``options`` say."""
    from transformers import Trainer

    from modulora_core.training.config import FinetuneConfig
    from modulora_core.training.finetune import finetune

    steps = []
    step = Trainer.training_step

    def counted(self, model, *arguments, **more):
        with Allocations([*model.parameters(), *model.buffers()]) as allocations:
            loss = step(self, model, *arguments, **more)
        steps.append(allocations.peak)
        return loss

    Trainer.training_step = counted  # type: ignore[method-assign]
    given = {"data": ["pydoc"], "steps": 2, "grad_accum": 1, "baseline": False, **options}
    result = finetune(FinetuneConfig.build(given))
    return {"peak": result.peak_memory_bytes, "work": max(steps)}


def quantizing(options):
    """Run ``modulora quantize``."""
    from modulora_core.quantization import quantize as module

    write, counted = module._write_packed, []

    def watched(*arguments, **more):
        with Allocations() as allocations:
            packed = write(*arguments, **more)
        counted.append(allocations.peak)
        return packed

    module._write_packed = watched
    result = module.quantize(options["model"], options["out"], options["quantizer"])
    return {"peak": result.peak_memory_bytes, "work": max(counted)}


def decoding(options):
    """Read a prompt of ``prompt`` tokens, and generate a few new ones."""
    from pydoc_data.topics import topics

    from modulora_core.inference.generate import generate
    from modulora_core.inference.opened import open_to_run
    from modulora_core.models.generation import Sampling

    opened = open_to_run(options["model"])
    with PeakMemory() as peak:
        model, tokenizer = opened.load(), opened.tokenizer
        ids = tokenizer("\n".join(topics.values())).input_ids[: options["prompt"]]
        with Allocations([*model.parameters(), *model.buffers()]) as allocations:
            text = tokenizer.decode(ids)
            output = generate((model, tokenizer), text, Sampling(max_new_tokens=4))
    return {"peak": peak.nbytes, "work": allocations.peak, "prompt": output.prompt_tokens}


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = {"training": training, "quantizing": quantizing, "decoding": decoding}[sys.argv[1]]
    print(json.dumps(job(json.loads(sys.argv[2]))))
