"""``modulora finetune``: its flags are the fields of FinetuneConfig."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined

from modulora_core.cli.sizes import format_size
from modulora_core.cli.terminal import Report, terminal
from modulora_core.finetune_config import FinetuneConfig

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from modulora_core.finetune import FinetuneResult

_ARGUMENTS = ("model", "out")


def command(config: str | None = None, resume: bool = False, **options: Any) -> Report:
    """Train a LoRA adapter on a packed model.

    The packed weights stay as they are; only the adapter trains, and OUT holds it in PEFT's format. The data is text
    (packed into windows), instructions, chats, or prompts and completions; of the latter three only the answers
    are trained. OUT/finetune.yaml makes the same run again; so does a file of your own with --config, whose values
    the flags override.

    Examples:
      modulora finetune smollm2-packed my-adapter --data 'pydoc[:90%]' --eval-data 'pydoc[90%:]' --steps 50
      modulora finetune smollm2-packed my-adapter --data chats.jsonl --epochs 3 --lr 2e-4 --rank 16
      modulora finetune smollm2-packed again --config my-adapter/finetune.yaml
      modulora finetune smollm2-packed my-adapter --data notes.txt --resume
    """
    request = FinetuneConfig.build(options, file=config)
    from modulora_core.finetune import finetune

    with terminal().progress("training", unit="steps") as bar:
        result = finetune(
            request, resume=resume, on_step=lambda step: bar.update(step.step, step.total, f"loss {step.loss:.3f}")
        )
    return Report(result.to_json(), _told(result))


def _told(result: FinetuneResult) -> str:
    lines = [f"{result.out}: {result.steps} steps, loss {result.losses[0]:.4f} → {result.losses[-1]:.4f}"]
    if result.eval_loss is not None:
        lines[0] += f", evaluation loss {result.eval_loss:.4f}"
    lines.append(f"{result.seconds:.1f} s, {result.tokens_per_second:.0f} tokens/s, "
                 f"peak memory {format_size(result.peak_memory_bytes)}")  # fmt: skip
    return "\n".join(lines)


def _signature() -> inspect.Signature:
    """One parameter for each field; None is 'not given', so that a config file's value holds."""
    parameters = [_parameter(name, field) for name, field in FinetuneConfig.model_fields.items()]
    frame = {
        "config": (str | None, None, typer.Option("--config", metavar="FILE", show_default=False, help="A YAML file of these options.")),
        "resume": (bool, False, typer.Option("--resume", help="Go on with a run that was interrupted.")),
    }
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in frame.items()
    ]
    return inspect.Signature(parameters, return_annotation=Report)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    told = field.description or ""
    told = told[:1].upper() + told[1:] if name != "alpha" else told  # α has its own meaning in upper case
    kind, metavar = _cli_type(field)
    if name in _ARGUMENTS:
        declared: Any = typer.Argument(metavar=name.upper(), show_default=False, help=told)
    else:
        if field.default not in (None, PydanticUndefined):
            shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            told += f" (default: {shown})"
        flag = f"--{name.replace('_', '-')}"
        names = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
        declared = typer.Option(names, metavar=None if kind is bool else metavar, show_default=False, help=told)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def _cli_type(field: FieldInfo) -> tuple[Any, str]:
    """What typer parses, and how its value is called in the help."""
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return str, "|".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        # several files are several flags; names of layers come in one, separated by commas
        return (str, "NAMES") if isinstance(field.default, tuple) else (list[str], "SOURCE")
    return annotation, {int: "N", float: "X"}.get(annotation, "TEXT")  # type: ignore[call-overload]


command.__signature__ = _signature()  # type: ignore[attr-defined]
