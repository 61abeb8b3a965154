"""Times `finetune` beside TRL's SFTTrainer and the library datasets, on one packed model and file.

    python examples/benchmarks/sft_trainer.py smollm2-nf4 --turns 3

Both train an adapter of rank 8 on prompts with completions, cut at ``--seq-len`` tokens, and
recompute activations. Each run has a process, and they take turns. ``start`` is the time to the
first step, imports too. A step is the median of those after the first. The peak is the resident
memory of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, LR = 2, 1e-4


def train(name: str, model: str, data: Path, out: Path, steps: int, seq_len: int) -> dict[str, Any]:
    """One run in this process; its times in seconds, its peak in MiB."""
    started = time.perf_counter()
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        on_step_end = on_step_begin

    clock = Clock()
    {"finetune": ours, "SFTTrainer": theirs}[name](model, data, out, steps, seq_len, clock)
    begins, ends = clock.times[::2], clock.times[1::2]
    seconds = [end - begin for begin, end in zip(begins, ends, strict=True)][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"start": begins[0] - started, "step": statistics.median(seconds), "peak": peak}


def ours(model: str, data: Path, out: Path, steps: int, seq_len: int, clock: Any) -> None:
    from modulora_core import FinetuneConfig, finetune

    config = FinetuneConfig(
        model=model, out=str(out), data=[str(data)], steps=steps, batch_size=BATCH,
        seq_len=seq_len, lr=LR, dropout=0.0, dtype="float32",
    )  # fmt: skip
    finetune(config, callbacks=[clock], progress=False)


def theirs(model: str, data: Path, out: Path, steps: int, seq_len: int, clock: Any) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from modulora_core import LoRASettings, add_lora, load_model

    packed = load_model(model, dtype="float32")
    add_lora(packed, LoRASettings(rank=8, alpha=32.0, dropout=0.0))
    SFTTrainer(
        model=packed,
        args=SFTConfig(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH,
            max_length=seq_len, learning_rate=LR, gradient_checkpointing=True, bf16=False,
            save_strategy="no", report_to=[], use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    ).train()  # fmt: skip


def records(file: Path, count: int, seq_len: int) -> None:
    """Write prompts with completions of more than ``seq_len`` tokens: each step is alike."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split())
    width = 8 * seq_len  # characters: some five make a token
    with file.open("w") as lines:
        for start in range(0, count * width, width):
            piece = text[start : start + width]
            lines.write(json.dumps({"prompt": piece[:80], "completion": piece[80:]}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a packed folder")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--only", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.only:
        folder = Path(flags.only[1])
        print(json.dumps(train(flags.only[0], flags.model, folder / "data.jsonl", folder / "out",
                               flags.steps, flags.seq_len)))  # fmt: skip
        return 0
    print(f"{'':12}{'start s':>9}{'step s':>9}{'peak MiB':>10}")
    for _ in range(flags.turns):
        for name in ("finetune", "SFTTrainer"):
            with tempfile.TemporaryDirectory() as folder:
                records(Path(folder) / "data.jsonl", 2 * BATCH * flags.steps, flags.seq_len)
                ran = subprocess.run(
                    [sys.executable, __file__, flags.model, "--steps", str(flags.steps),
                     "--seq-len", str(flags.seq_len), "--only", name, folder],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
            if ran.returncode:
                raise SystemExit(ran.stderr)
            r = json.loads(ran.stdout.splitlines()[-1])
            print(f"{name:12}{r['start']:9.1f}{r['step']:9.2f}{r['peak']:10.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
