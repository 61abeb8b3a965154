"""Makes one training step of a LLaMA with 65 billion weights in 2 bits, and measures its memory.

    python examples/benchmarks/llama65b.py                                    # 17 GB on disk
    python examples/benchmarks/llama65b.py --model 7b --seq-len 16            # quick
    python examples/benchmarks/llama65b.py --model 13b -q optq:bits=3 --mapped --folder checkpoints

The shapes are LLaMA's, and the weights are random (:mod:`llama`). A process of its own loads the
packed model and puts a LoRA of rank 8 on every linear layer. It makes the step of `modulora
finetune`, with chunked loss, gradient checkpointing and AdamW. Then it decodes one token. The peak
is of the whole process; `modulora plan FOLDER` predicts it.

The exit code is 1 if the loss or a gradient is not finite, or a gradient is zero.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from llama import SHAPES, write_checkpoint
from torch import nn
from turns import Here, Job, Process

from modulora_core import LoRASettings, add_lora, load_model
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.lora.adapted import adapter_layers
from modulora_core.registry import Choice
from modulora_core.training.chunked_loss import chunked_loss
from modulora_core.training.gradient_checkpointing import checkpoint_activations

GB = 10**9
RANK = 8

PHASES = ("libraries", "load", "forward", "backward", "adamw", "greedy_token")


class StepJob:
    """One training step and one token of a packed checkpoint, phase by phase."""

    def __init__(self, folder: str, request: dict[str, Any]) -> None:
        self._folder, self._request = folder, request
        torch.manual_seed(0)

    def phase(self, name: str) -> dict[str, Any]:
        """Run one of :data:`PHASES`. Returns its seconds, its peak memory and its results."""
        started = time.perf_counter()
        with PeakMemory(self._request["device"]) as peak:
            facts = getattr(self, f"_{name}")()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "peak_memory_bytes": peak.nbytes, **(facts or {})}

    def _libraries(self) -> None:
        small = torch.zeros(256, 256, device=self._request["device"])
        small @ small  # starts the threads or the device

    def _load(self) -> None:
        names = ("dtype", "device", "mapped")
        self._model: Any = load_model(self._folder, **{n: self._request[n] for n in names})
        add_lora(self._model, LoRASettings(RANK, dropout=0.0))
        for _, layer in adapter_layers(self._model):
            nn.init.normal_(layer.lora_B["default"], std=1e-3)  # with B = 0, A has no gradient
        self._model.train()
        self._model.config.use_cache = False
        if self._request["gradient_checkpointing"]:
            checkpoint_activations(self._model)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-3)
        size = (1, self._request["seq_len"])
        self._ids = torch.randint(3, self._model.config.vocab_size, size).to(self._model.device)

    def _forward(self) -> dict[str, Any]:
        with chunked_loss(self._model):
            self._loss = self._model(input_ids=self._ids, labels=self._ids).loss
        return {"loss": float(self._loss.detach())}

    def _backward(self) -> dict[str, Any]:
        self._loss.backward()
        return {"gradients": len(self._trained), "bad_gradients": bad_gradients(self._model),
                "trained": sum(p.numel() for p in self._trained)}  # fmt: skip

    def _adamw(self) -> None:
        self._optimizer.step()

    def _greedy_token(self) -> dict[str, Any]:
        with torch.no_grad():
            logits = self._model.eval()(input_ids=self._ids[:, :1], use_cache=False).logits
        return {"token": int(logits[0, -1].argmax())}


def bad_gradients(model: nn.Module) -> list[str]:
    """The trained parameters whose gradient is missing, zero, or not finite."""

    def is_good(gradient: torch.Tensor | None) -> bool:
        return gradient is not None and bool(gradient.isfinite().all() and gradient.any())

    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and not is_good(p.grad)]


def run(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the checkpoint, and make the step."""
    name = f"{flags.model}-{flags.quantizer}".replace(":", "-").replace("=", "").replace(",", "-")
    checkpoint = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        flags.model, Choice.parse(flags.quantizer).create(), checkpoint, progress=show_progress
    )
    names = ("seq_len", "dtype", "device", "mapped", "gradient_checkpointing")
    request = {name: getattr(flags, name) for name in names}
    words = (StepJob, str(checkpoint), request)
    job: Job = Here(*words) if flags.one_process else Process(*words, timeout=86_400.0)
    phases = {}
    for phase in PHASES:
        phases[phase] = job.ask("phase", phase)
        seconds, peak = phases[phase]["seconds"], phases[phase]["peak_memory_bytes"]
        print(f"{phase}: {seconds:.1f} s, peak {peak / GB:.2f} GB", file=sys.stderr)
    job.end()
    return {
        "request": {"model": flags.model, "quantizer": flags.quantizer, **request},
        "checkpoint_bytes": open_packed(checkpoint).nbytes,
        "phases": phases,
        "peak_memory_bytes": max(phase["peak_memory_bytes"] for phase in phases.values()),
    }


def show_progress(_: str, done: int, total: int) -> None:
    if done % (total // 8 + 1) == 0 or done == total:
        print(f"writing: {done} of {total} parameters", file=sys.stderr, flush=True)


def report(found: dict[str, Any]) -> str:
    request, phases = found["request"], found["phases"]
    bad, trained = phases["backward"]["bad_gradients"], phases["backward"]["trained"]
    return f"""\
LLaMA {request["model"]}, {request["quantizer"]}, {found["checkpoint_bytes"] / GB:.2f} GB on disk
1 × {request["seq_len"]} tokens, LoRA of rank {RANK} with {trained / 1e6:.1f} million values
Loss {phases["forward"]["loss"]:.3f}. Wrong gradients: {", ".join(bad) or "none"}.
Peak: {found["peak_memory_bytes"] / GB:.2f} GB."""


def main(words: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model", default="65b", choices=tuple(SHAPES), help="the shapes (65b)")
    add("-q", "--quantizer", default="quip-sharp-e8", metavar="NAME[:OPTION=VALUE,...]")
    add("--folder", type=Path, help="keep checkpoints there, and use those that are there")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--seq-len", type=int, default=128, help="tokens of the sequence (128)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="(bfloat16)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--mapped", action="store_true", help="leave packed weights in their files")
    add("--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_false")
    add("--one-process", action="store_true", help="for a debugger")
    flags = parser.parse_args(words)
    with ExitStack() as stack:
        folder = flags.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = run(flags, folder)
    print(report(found))
    if flags.json is not None:
        flags.json.write_text(json.dumps(found, indent=1) + "\n")
    phases = found["phases"]
    is_finite = math.isfinite(phases["forward"]["loss"])
    return 0 if is_finite and not phases["backward"]["bad_gradients"] else 1


if __name__ == "__main__":
    sys.exit(main())
