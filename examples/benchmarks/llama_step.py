"""One training step and one greedy token of a packed checkpoint, measured phase by phase. :mod:`llama65b` runs it in a process of its own.

The step is that of `modulora finetune`: the chunked loss, gradient checkpointing, AdamW. Every token is random and is a label. B isn't zero
as it is at the start of a real run, where A's gradient would be zero; it is drawn small, so that every adapter's gradients can be checked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modulora_core.adapters.lora import LoRASettings, adapter_layers, add_lora
from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.devices.memory import PeakMemory
from modulora_core.training.chunked_loss import chunked_loss
from modulora_core.training.gradient_checkpointing import checkpoint_activations

RANK = 8
B_DEVIATION = 1e-3


class Phases:
    """Seconds and peak memory of each phase, and what it was made of: anonymous pages, and pages of mapped files.

    ``cpu_seconds`` are those of all threads together: what a busy machine changes least.
    The kernel keeps a peak of the whole alone. Its parts are read at the entry of every block, forward and back: ``anonymous_bytes`` and
    ``mapped_bytes`` are the most that was seen of each.
    """

    def __init__(self, device: str, *, loud: bool) -> None:
        self.told: dict[str, dict[str, float]] = {}
        self._device, self._loud = device, loud
        self._entries = 0
        self._parts = (0, 0)

    def watch(self, blocks: nn.ModuleList) -> None:
        def on_output(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._enter(len(blocks)))

        for block in blocks:
            block.register_forward_pre_hook(lambda *_: self._enter(len(blocks)))
            block.register_forward_hook(on_output)

    def _enter(self, blocks: int) -> None:
        self._entries += 1
        self._look()
        if self._loud and (self._entries % max(1, blocks // 8) == 0 or self._entries == 1):
            seconds = time.perf_counter() - self._started
            print(f"  {self._phase}: block {self._entries} of {blocks}, {seconds:.0f} s", file=sys.stderr, flush=True)  # fmt: skip

    def _look(self) -> None:
        self._parts = tuple(map(max, self._parts, _resident_parts()))  # type: ignore[assignment]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phase, self._entries, self._parts = name, 0, _resident_parts()
        self._started, cpu = time.perf_counter(), time.process_time()
        with PeakMemory(self._device) as peak:
            yield
            self._look()
        seconds, cpu = time.perf_counter() - self._started, time.process_time() - cpu
        anonymous, mapped = self._parts
        self.told[name] = {"seconds": seconds, "cpu_seconds": cpu, "peak_memory_bytes": peak.nbytes,
                           "anonymous_bytes": anonymous, "mapped_bytes": mapped}  # fmt: skip
        if self._loud:
            print(
                f"{name}: {seconds:.1f} s, peak {peak.nbytes / 2**30:.2f} GiB",
                file=sys.stderr,
                flush=True,
            )


def _resident_parts() -> tuple[int, int]:
    """Bytes of anonymous pages and of files' pages in the resident set; zeros where the system doesn't tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0, 0
    lines = dict(
        line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Rss")
    )
    anonymous, mapped = (
        int(lines.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssFile")
    )
    return anonymous, mapped


def step(flags: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, as JSON."""
    checkpoint = open_checkpoint(flags.folder)
    phases = Phases(flags.device, loud=not flags.quiet)
    torch.manual_seed(0)
    with phases.phase("libraries"):
        torch.zeros(256, 256, device=flags.device) @ torch.zeros(256, 256, device=flags.device)
    with phases.phase("load"):
        model = load_model(checkpoint, dtype=flags.dtype, device=flags.device, mapped=flags.mapped)
        add_lora(model, LoRASettings(RANK, dropout=0.0))
        for _, layer in adapter_layers(model):
            nn.init.normal_(layer.lora_B["default"], std=B_DEVIATION)
    phases.watch(model.model.layers)
    ids = torch.randint(3, model.config.vocab_size, (1, flags.seq_len)).to(model.device)
    loss = _train(model, ids, phases, checkpointing=flags.gradient_checkpointing)
    with phases.phase("greedy token"), torch.no_grad():
        model.eval()
        token = int(model(input_ids=ids[:, :1], use_cache=False).logits[0, -1].argmax())
    return {
        "loss": loss,
        "expected_loss": math.log(model.config.vocab_size) + 0.5,
        "token": token,
        "phases": phases.told,
        "seconds_of_step": sum(
            phases.told[name]["seconds"] for name in ("forward", "backward", "optimizer")
        ),
        "peak_memory_bytes": max(phase["peak_memory_bytes"] for phase in phases.told.values()),
        **_gradients(model),
    }


def _train(model: Any, ids: Tensor, phases: Phases, *, checkpointing: bool) -> float:
    model.train()
    model.config.use_cache = False
    if checkpointing:
        checkpoint_activations(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    with phases.phase("forward"), chunked_loss(model):
        loss = model(input_ids=ids, labels=ids).loss
    with phases.phase("backward"):
        loss.backward()
    with phases.phase("optimizer"):
        optimizer.step()
    return float(loss.detach())


def _gradients(model: nn.Module) -> dict[str, Any]:
    """How many gradients there are, and which aren't finite or are zero."""
    gradients = {
        f"{path}.{kind}": parameter.grad
        for path, layer in adapter_layers(model)
        for kind, parameter in layer.parameters_of("default").items()
    }
    bad = [
        name
        for name, gradient in gradients.items()
        if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any())
    ]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"gradients": len(gradients), "bad_gradients": bad, "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    step_flags(parser)
    print(json.dumps(step(parser.parse_args())))


def step_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seq-len", type=int, default=128, help="tokens of the one sequence (128)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of embeddings, head and activations (bfloat16)")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda (cpu)")
    add(
        "--mapped",
        action="store_true",
        help="one decoder block's packed weights in memory at a time",
    )
    add("--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_false",
        help="keep activations: no second forward, more memory")  # fmt: skip
    add("--quiet", action="store_true", help="no progress on stderr")


if __name__ == "__main__":
    main()
