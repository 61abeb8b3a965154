"""Run in a process of its own: finetune a packed model, and print what it took as one JSON object.

python planned_run.py MODEL OUT '{"rank": 8, ...}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from modulora_core.adapter_trainer import AdapterTrainer
from modulora_core.finetune import finetune
from modulora_core.finetune_config import FinetuneConfig
from modulora_core.memory import Allocations


def main(model: str, out: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    steps: list[int] = []
    step = AdapterTrainer.training_step

    def counted(self: Any, model: Any, *arguments: Any, **more: Any) -> Any:
        with Allocations([*model.parameters(), *model.buffers()]) as allocations:
            loss = step(self, model, *arguments, **more)
        steps.append(allocations.peak)
        return loss

    AdapterTrainer.training_step = counted  # type: ignore[method-assign]
    request = {"model": model, "out": out, "data": ["pydoc"], "steps": 2, "grad_accum": 1, **options}
    result = finetune(FinetuneConfig.build(request))
    print(json.dumps({"peak": result.peak_memory_bytes, "step": max(steps)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
