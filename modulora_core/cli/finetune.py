"""``modulora finetune``: its flags are the fields of FinetuneConfig."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from modulora_core.cli.arguments import Resume
from modulora_core.cli.sizes import format_size
from modulora_core.cli.terminal import Report, terminal
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.losses import loss_in_words

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from modulora_core.training.finetune import FinetuneResult
    from modulora_core.training.trainer import TrainingStep

_ARGUMENTS = ("model", "out")
_METAVARS = {int: "N", float: "X", str: "TEXT", list[str]: "SOURCE"}

ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        show_default=False,
        help="Read options from YAML; flags override it.",
    ),
]


def command(config: str | None = None, resume: bool = False, **options: Any) -> Report:
    """Train a LoRA adapter on a packed model.

    The packed weights stay as they are; only the adapter trains, and OUT holds it in PEFT's format. The data
    is text (packed into windows), instructions, chats, or prompts and completions; of the latter three only
    the answers are trained. Say how long with --steps or --epochs. With --train-scales OUT also holds
    vectors that scale each layer's inputs and outputs, which PEFT alone leaves out.

    OUT/finetune.yaml has every option of the run; with --config it, or a file of your own, makes it again.

    Examples:
      modulora finetune smollm2-packed my-adapter --data notes.txt --steps 100
      modulora finetune smollm2-packed my-adapter --data chats.jsonl --epochs 3 --lr 2e-4 --rank 16
      modulora finetune smollm2-packed my-adapter --data notes.txt --steps 100 --train-scales
      modulora finetune smollm2-packed my-adapter --data 'pydoc[:90%]' --eval-data 'pydoc[90%:]' --steps 50
      modulora finetune smollm2-packed another --config my-adapter/finetune.yaml --seed 1
      modulora finetune smollm2-packed my-adapter --data notes.txt --steps 100 --resume
    """
    request = FinetuneConfig.build(options, file=config)
    from modulora_core.training.finetune import finetune

    with terminal().progress("training", unit="steps") as bar:

        def on_step(step: TrainingStep) -> None:
            bar.update(step.step, step.total, f"training, loss {step.loss:.4f}")

        def on_eval(step: int, loss: float) -> None:
            terminal().note(f"step {step}: loss {loss:.4f} on the evaluation data")

        result = finetune(request, resume=resume, on_step=on_step, on_eval=on_eval)
    return Report(result.to_json(), _told(result))


def _told(result: FinetuneResult) -> str:
    held_out = (
        "" if result.eval_loss is None else f", {result.eval_loss:.4f} on the evaluation data"
    )
    return (
        f"{result.out}: {result.steps} steps, {loss_in_words(result.losses)}{held_out}\n"
        f"{result.seconds:.1f} s, {result.tokens_per_second:.0f} tokens/s, "
        f"peak memory {format_size(result.peak_memory_bytes)}"
    )


def _signature() -> inspect.Signature:
    """A parameter for each field. None is 'not given': the config file's value, or the default, holds."""
    kinds = {name: _parameter(name, field) for name, field in FinetuneConfig.model_fields.items()}
    defaults = dict.fromkeys(kinds) | {"config": None, "resume": False}
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind
        )
        for name, kind in {**kinds, "config": ConfigFile, "resume": Resume}.items()
    ]
    return inspect.Signature(parameters, return_annotation=Report)


def _parameter(name: str, field: FieldInfo) -> Any:
    """What typer is told about a field."""
    kind, metavar = _kind(field)
    description = field.description or ""
    told = description[:1].upper() + description[1:]
    if name in _ARGUMENTS:
        told += "; it may be in --config instead."
        return Annotated[
            str | None, typer.Argument(metavar=name.upper(), show_default=False, help=told)
        ]
    flag = name.replace("_", "-")
    return Annotated[
        kind | None,
        typer.Option(
            f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
            metavar=metavar,
            show_default=False,  # None, since the default is the config's
            help=f"{told}{_default(field)}.",
        ),
    ]


def _kind(field: FieldInfo) -> tuple[Any, str | None]:
    """The type that typer parses, and its name in the help. pydantic checks the value."""
    kind: Any = field.annotation
    if type(None) in get_args(kind):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return str, "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        # several sources are several flags; names of layers come in one, separated by commas
        return (str, "NAMES") if field.default == ("all-linear",) else (list[str], "SOURCE")
    return kind, _METAVARS.get(kind)


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default is None:
        return ""
    shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    return f" (default: {shown})"


command.__signature__ = _signature()  # type: ignore[attr-defined]  # what typer reads
