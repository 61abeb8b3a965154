"""The config of a finetuning run. Importing this module does not import torch.

The flags of the command line, a ``--config`` file, and the ``finetune.yaml`` of each run are the
fields of :class:`FinetuneConfig`. Defaults and descriptions exist here only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    model_validator,
)

from modulora_core.data.files import Record
from modulora_core.data.formats import check_all, detect
from modulora_core.data.templates import Template
from modulora_core.errors import OptionError
from modulora_core.options import validate_model

_EXCLUSIVE: Mapping[str, tuple[str, ...]] = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "adapter": ("rank", "alpha", "targets", "train_scales"),
}
"""Fields of a file that give way to a flag."""

_LARGEST = 1e30
"""Limit of a factor: float32 ends at 3.4e38, and a run multiplies factors."""


def _one_or_more(value: Any) -> Any:
    if isinstance(value, str | os.PathLike):
        return (os.fspath(value),)
    if isinstance(value, list | tuple) and all(isinstance(v, str | os.PathLike) for v in value):
        return tuple(map(os.fspath, value))
    return value  # pydantic names what it is


def _comma_separated(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def _pairs(value: Any) -> Any:
    """Read ``["KEY=VALUE", ...]`` as the command line gives it."""
    if not isinstance(value, list | tuple):
        return value
    if not all("=" in str(word) for word in value):
        raise ValueError("expected KEY=VALUE")
    return dict(str(word).split("=", 1) for word in value)


def _unwrapped(value: Sequence[str]) -> str | list[str]:
    return value[0] if len(value) == 1 else list(value)


_Serializer = PlainSerializer(_unwrapped, return_type=str | list[str])
Sources = Annotated[Sequence[str], BeforeValidator(_one_or_more), _Serializer]
Names = Annotated[Sequence[str], BeforeValidator(_comma_separated), _Serializer]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    BeforeValidator(lambda dtype: str(dtype).removeprefix("torch.")),  # torch.float32 too
]
PathName = Annotated[str, BeforeValidator(lambda v: str(v) if isinstance(v, os.PathLike) else v)]
Pairs = Annotated[dict[str, Any], BeforeValidator(_pairs)]


class FinetuneConfig(BaseModel):
    """A finetuning run.

    The defaults of optimizer and adapter are the paper's (arXiv 2309.16119), except targets and
    batches, which depend on the task there.

    Raises OptionError: an unknown field (with near misses), or a bad value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    command: ClassVar[str] = "finetune"
    """The command whose options are these fields; a subclass of a plugin has another one."""

    private: ClassVar[frozenset[str]] = frozenset({"model", "out", "data", "eval_data"})
    """Fields with names of folders, which the model card leaves out."""

    model: PathName = Field(
        description="quantized model: a folder of `modulora quantize` or of another tool, a "
        "plugin's file, or a Hub id; with quantizer, a dense model"
    )
    out: PathName = Field(description="folder to write the adapter to")
    data: Sources | None = Field(
        default=None, min_length=1, description="training data: files, a Hub dataset, or pydoc"
    )
    quantizer: str | None = Field(
        default=None,
        description="quantize a dense model first, with NAME or NAME:KEY=VALUE,...; the packed "
        "model stays in a cache, $MODULORA_CACHE or modulora in the Hub's",
    )
    calibration: PathName | None = Field(
        default=None, description="calibration text, of a quantizer that needs one"
    )
    quality: Literal["fast", "balanced", "best"] = Field(
        default="balanced", description="of quantizing: less time, or less loss, at the same size"
    )
    format: Literal["auto", "text", "instruct", "chat", "completion", "tokens"] = Field(
        default="auto", description="format of the records"
    )
    prompt: str | None = Field(
        default=None, description="template of a prompt from columns, such as 'Sum up: {dialogue}'"
    )
    completion: str | None = Field(
        default=None, description="template of its completion, such as '{summary}'; needs prompt"
    )
    eval_data: Sources | None = Field(
        default=None, description="data to measure the loss on; not trained"
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="steps between evaluations; there is always one at the end"
    )

    rank: int = Field(default=8, ge=1, description="rank r of the adapter")
    alpha: float = Field(
        default=32.0, gt=0, description="the adapter is multiplied by alpha / rank"
    )
    dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="dropout of the adapter's input; beside adapter, by default its own",
    )
    targets: Names = Field(
        default=("all-linear",),
        min_length=1,
        description="layers to adapt: all-linear, attention, experts, or names; several are "
        "separated by commas",
    )
    train_scales: bool = Field(
        default=False,
        description="also train two vectors per layer, which scale its input and its output",
    )
    adapter: PathName | None = Field(
        default=None, description="train this adapter further, instead of a new one"
    )

    steps: int | None = Field(default=None, ge=1, description="optimizer steps, instead of epochs")
    epochs: float | None = Field(
        default=None, gt=0, le=1e6, description="passes over the data; 1 if steps is absent too"
    )
    batch_size: int = Field(default=4, ge=1, description="examples per forward pass and process")
    grad_accum: int = Field(default=1, ge=1, description="forward passes per optimizer step")
    packing: bool = Field(
        default=False,
        description="join short examples to rows of seq_len; attention stays within an example",
    )
    seq_len: int = Field(default=512, ge=2, description="maximum length of an example, in tokens")

    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="schedule of the learning rate after the warm-up"
    )
    warmup: float = Field(
        default=0.06,
        ge=0,
        description="warm-up: a fraction of the steps if below 1, else a step count",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of A and B")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="clip gradients to this norm; 0: never"
    )
    optim: str = Field(
        default="adamw_torch",
        description="optimizer, by its name in transformers, such as adamw_torch, adamw_bnb_8bit, "
        "paged_adamw_32bit, adafactor",
    )

    dtype: Dtype = Field(
        default="auto", description="dtype of activations; auto is float32 on a CPU, else bfloat16"
    )
    matmul_precision: Literal["highest", "high"] | None = Field(
        default=None,
        description="precision of float32 products, by torch's name; high is faster on GPUs and on "
        "CPUs with AMX, and rounds more; the default is torch's setting, highest",
    )
    mapped: bool = Field(
        default=False,
        description="leave packed weights in their files and read one decoder block at a time; "
        "CPU only",
    )
    gradient_checkpointing: bool = Field(
        default=True, description="recompute activations in the backward instead of saving them"
    )
    keep_products: bool = Field(
        default=False,
        description="save the products with packed weights for the backward; "
        "gradient checkpointing then recomputes only the rest",
    )
    offload_activations: bool = Field(
        default=False, description="keep saved activations in CPU memory; GPU only"
    )
    shard: bool = Field(
        default=False,
        description="split the weights over the processes (FSDP2), instead of a copy for each",
    )
    parity_check: bool = Field(
        default=True,
        description="on a GPU, compare the kernels of each kind of layer with plain torch, which "
        "takes the place of kernels that differ",
    )
    seed: int = Field(
        default=0, ge=0, description="seed of the adapter, the data order and the dropout"
    )
    save_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    report_to: Names = Field(
        default=(),
        description="experiment trackers, separated by commas: tensorboard, wandb, mlflow, ...",
    )
    baseline: bool = Field(
        default=True,
        description="also measure the loss without the adapter: on eval_data, or on examples that "
        "the run did not reach, which takes at most a fifth of the run's time",
    )
    lora_file: PathName | None = Field(
        default=None,
        description="also write the adapter to this file, in the format of its suffix; it needs a "
        "file of that format as MODEL",
    )
    trainer: Pairs = Field(
        default={}, description="any other field of transformers' TrainingArguments, as KEY=VALUE"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"expected steps or epochs, got both: {self.steps} steps and {self.epochs:g} epochs"
            )
        for name, value in self:
            if isinstance(value, int) and value >= 2**32:
                raise ValueError(f"{name}: expected less than 2**32, got {value!s:.20}")
        for name in ("lr", "alpha"):
            if getattr(self, name) > _LARGEST:
                raise ValueError(
                    f"{name}: expected at most {_LARGEST:g}, got {getattr(self, name):g}"
                )
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(
                f"warmup: expected a fraction below 1 or a whole number of steps, got {self.warmup}"
            )
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("expected prompt and completion together, got one of them")
        if self.prompt is not None and self.format not in ("auto", "completion"):
            raise ValueError(f"format {self.format}: expected no other format beside prompt")
        if self.quantizer is None and self.quality != "balanced":
            raise ValueError("quality: expected quantizer beside it, got none")
        if self.quantizer is None and self.calibration:
            raise ValueError("calibration: expected quantizer beside it, got none")
        if self.keep_products and not self.gradient_checkpointing:
            raise ValueError(
                "keep_products: expected gradient_checkpointing, got none; without it, the "
                "backward saves all products anyway"
            )
        given = [name for name in _EXCLUSIVE["adapter"] if name in self.model_fields_set]
        if self.adapter is not None and given:
            raise ValueError(
                f"{', '.join(given)}: the adapter {self.adapter} has its own; leave it out"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _refused(cls, values: Any, validate: Any, info: ValidationInfo) -> Any:
        # defined last, it is around the others
        if not isinstance(values, Mapping):
            return validate(values)
        return validate_model(info.context or cls.__name__, cls, values, validate)

    @classmethod
    def build(cls, options: Mapping[str, object], *, file: str | Path | None = None) -> Self:
        """Build a config from options and a YAML file.

        Args:
            options: by field name; strings are parsed, None counts as absent. They override the
                file.
            file: the file that ``--config`` names.

        Raises OptionError: an unknown option (with near misses), a bad value, or a malformed file.
        """
        given = {name: value for name, value in options.items() if value is not None}
        values = {} if file is None else read_options(Path(file))
        for name in given:
            for other in _EXCLUSIVE.get(name, ()):
                values.pop(other, None)
        subject = cls.command if file is None else f"{cls.command} with {file}"
        return cls.model_validate({**values, **given}, context=subject)

    def check_records(self, records: Sequence[Record]) -> None:
        """Check records of the data as far as no tokenizer is needed. Raises RequestError."""
        template = Template.of(self.prompt, self.completion)
        filled = records if template is None else template.fill(records)
        check_all(filled, detect(filled, self.format))

    def in_window(self, longest: int | None, model: str) -> FinetuneConfig:
        """The config with a ``seq_len`` that ``model`` can take: its context, if none was given.

        Raises OptionError: the given ``seq_len`` is above ``longest``, the model's context.
        """
        if longest is None or self.seq_len <= longest:
            return self
        if "seq_len" in self.model_fields_set or longest < 2:
            raise OptionError(
                f"seq_len {self.seq_len}: expected at most {longest}, the context of {model}"
            )
        return self.model_copy(update={"seq_len": longest})

    def to_yaml(self) -> str:
        """The file that repeats the run: ``modulora finetune --config FILE``."""
        adapter = set() if self.adapter is None else set(_EXCLUSIVE["adapter"])
        values = self.model_dump(mode="json", exclude_none=True, exclude=adapter)
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        command = f"modulora {self.command} --config FILE"
        return f"# {command} repeats this run; flags override it.\n{text}"

    def differences(self, other: FinetuneConfig) -> list[str]:
        """The fields that differ from ``other``'s: ``"lr 0.001 → 0.01"``.

        Not of outputs, nor of how a batch is divided over processes and forward passes.
        """
        left_out = {"out", "baseline", "report_to", "lora_file", "batch_size", "grad_accum",
                    "shard", "parity_check"}  # fmt: skip
        mine = self.model_dump(mode="json", exclude=left_out)
        others = other.model_dump(mode="json", exclude=left_out)
        names = [name for name in mine if mine[name] != others[name]]
        return [f"{name} {others[name]!r} → {mine[name]!r}" for name in names]


def read_options(path: Path) -> dict[str, object]:
    """The options of a config file by their names, unchecked. Raises OptionError."""
    from modulora_core.models.json_files import read_yaml  # imports torch

    values = read_yaml(path, OptionError)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise OptionError(
            f"config {path}: expected lines of `option: value`, got {type(values).__name__}"
        )
    return {name: value for name, value in values.items() if value is not None}
