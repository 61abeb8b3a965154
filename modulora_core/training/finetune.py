"""Finetune an adapter on a packed model: from a config to an adapter folder.

OUT/finetune.yaml                 the config, written before training: what ``resume`` compares with
OUT/checkpoints/checkpoint-N/     while it trains; each is an adapter too
OUT/README.md                     a model card
OUT/modulora.json                 which base it is for
OUT/adapter_model.safetensors
OUT/modulora_scales.safetensors   with channel scales only
OUT/adapter_config.json           last: with it, OUT is a finished adapter
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modulora_core.adapters.lora import (
    AdapterFolder,
    LoRASettings,
    adapter_layers,
    add_lora,
    check_rank,
    load_adapter,
    save_adapter,
    set_adapter,
)
from modulora_core.adapters.peft_format import CONFIG_FILE
from modulora_core.adapters.targets import select_targets
from modulora_core.checkpoints.checkpoint import (
    PackedCheckpoint,
    check_mapped,
    load_model,
    open_checkpoint,
)
from modulora_core.checkpoints.outputs import (
    check_disk_space,
    check_output,
    only_writer,
    partial_name,
    write_file,
)
from modulora_core.data import Collator, Examples, load_examples
from modulora_core.devices import pick_device
from modulora_core.devices.memory import PeakMemory
from modulora_core.errors import OptionError, OutputError
from modulora_core.models.quiet import quiet
from modulora_core.models.unfinished import RUN_FILE
from modulora_core.training.adapter_trainer import AdapterFiles
from modulora_core.training.checkpoints import latest_checkpoint, remove_half_written
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.losses import divergence
from modulora_core.training.model_card import model_card
from modulora_core.training.trainer import OnEval, OnStep, Outcome, check_optimizer, train

CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What a run came to.

    Attributes:
        losses: of every optimizer step, over the trained tokens of its batch.
        eval_loss: after the last step; None without evaluation data.
        seconds: of training, in this call: a resumed run's earlier steps don't count.
        tokens_per_second: without padding.
        peak_memory_bytes: of loading and training (:class:`modulora_core.devices.memory.PeakMemory`).
    """

    out: str
    steps: int
    losses: list[float]
    eval_loss: float | None
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    on_eval: OnEval | None = None,
) -> FinetuneResult:
    """Train an adapter and write it to ``config.out``, in PEFT's format.

    Args:
        config: the run; :meth:`FinetuneConfig.build` makes one from options and a file.
        resume: go on with a run of the same config that was interrupted, from its last whole checkpoint. The
            losses are those of an uninterrupted run. Where there is no whole checkpoint, begin.
        on_step: is called after every optimizer step, for progress and logs.
        on_eval: is called after every evaluation.

    Raises:
        OutputError: ``out`` holds a finished adapter, other things, or, without ``resume``, whole checkpoints
            of an unfinished run. A run that left none is begun anew, whatever its config was.
        OptionError: an option doesn't fit the model, the device, or the run to be resumed.
        ModelError: the model isn't packed: `modulora quantize` comes first.
        RequestError: the data, the adapter to go on with, or the model can't be used. All these come before
            any work.
        WorkError: the loss became NaN or infinite.
    """
    out = Path(config.out)
    resume_from = _check_out(out, config, resume)
    device = pick_device()
    _check_device(config, device)
    check_optimizer(config.optim)
    checkpoint = open_checkpoint(config.model)
    if config.mapped:
        check_mapped(checkpoint, str(device))
    _check_window(config, checkpoint)
    if config.adapter is None:
        _check_targets(config, checkpoint)
    else:
        AdapterFolder(config.adapter)  # a bad one is refused before the model is loaded
    tokenizer = checkpoint.tokenizer()
    examples = _examples(config.data, tokenizer, config)
    eval_examples = (
        None if config.eval_data is None else _examples(config.eval_data, tokenizer, config)
    )
    with PeakMemory(device) as peak, quiet():
        model = load_model(checkpoint, dtype=config.dtype, device=str(device), mapped=config.mapped)
        settings = _adapt(model, config)
        check_disk_space(out, _nbytes(model))
        out.mkdir(parents=True, exist_ok=True)
        with only_writer(out):
            write_file(out / RUN_FILE, config.to_yaml())
            remove_half_written(out / CHECKPOINTS)
            outcome = train(
                model,
                examples,
                Collator(_pad_token_id(tokenizer)),
                config,
                out / CHECKPOINTS,
                files=_adapter_files(model, settings),
                eval_examples=eval_examples,
                resume_from=resume_from,
                on_step=on_step,
                on_eval=on_eval,
            )
    result = _result(config, outcome, peak.nbytes)
    scaled = any(layer.input_scale for _, layer in adapter_layers(model))
    card = model_card(config, checkpoint, result.losses, result.eval_loss, channel_scales=scaled)
    write_file(out / "README.md", card)
    save_adapter(model, out, settings=settings)
    _warn_if_worse(result, config, model.config.get_text_config().vocab_size)
    return result


def _check_out(out: Path, config: FinetuneConfig, resume: bool) -> Path | None:
    """The checkpoint to resume from, if any."""
    if (out / CONFIG_FILE).is_file():
        raise _finished(out, resume)
    if not (out / RUN_FILE).is_file():
        check_output(out)
        return None
    checkpoint = latest_checkpoint(out / CHECKPOINTS)
    if checkpoint is None:  # nothing would be lost, and so nobody has to decide what becomes of it
        if not resume:
            _check_only_begun(out)
        logger.info("%s: beginning anew, as the run in it left no whole checkpoint", out)
        return None
    if not resume:
        raise OutputError(
            f"output folder {out}: it holds an unfinished run; go on with it with --resume, or remove it"
        )
    changed = config.differences(FinetuneConfig.build({}, file=out / RUN_FILE))
    if changed:
        raise OptionError(
            f"resume of {out}: expected the options that it was begun with ({RUN_FILE}), got others: "
            f"{'; '.join(changed)}; to train with these, choose another OUT, or remove {out} and begin anew"
        )
    logger.info("%s: resuming from %s", out, checkpoint)
    return checkpoint


def _finished(out: Path, resume: bool) -> OutputError:
    if not resume:
        return OutputError(
            f"output folder {out}: it holds a finished adapter; choose another name or remove it"
        )
    return OutputError(
        f"resume of {out}: it holds a finished adapter, so there is nothing left to resume; to train it on, "
        f"choose another OUT and give --adapter {out}"
    )


def _check_only_begun(out: Path) -> None:
    """Refuse a folder that somebody else's files are in too: a run's README.md would replace one of theirs."""
    begun = {RUN_FILE, partial_name(Path(RUN_FILE)).name, CHECKPOINTS}
    others = sorted(path.name for path in out.iterdir() if path.name not in begun)
    if others:
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise OutputError(
            f"output folder {out}: expected it new or empty, or what a run leaves before its first checkpoint, found "
            f"{len(others)} other entries ({some}); choose another name or remove them"
        )


def _check_device(config: FinetuneConfig, device: torch.device) -> None:
    if config.dtype == "float16" and device.type == "cpu":
        raise OptionError(
            "dtype float16: training in it takes a GPU; on a CPU expected float32 or bfloat16"
        )
    if config.offload_activations and device.type == "cpu":
        raise OptionError(
            "offload_activations: expected a GPU, got a CPU, whose memory already holds the activations"
        )


def _check_window(config: FinetuneConfig, checkpoint: PackedCheckpoint) -> None:
    for name in ("max_position_embeddings", "n_positions"):
        longest = checkpoint.config.get(name)
        if isinstance(longest, int) and config.seq_len > longest:
            raise OptionError(
                f"seq_len {config.seq_len}: expected at most {longest}, the {name} of {config.model}"
            )


def _check_targets(config: FinetuneConfig, checkpoint: PackedCheckpoint) -> None:
    """Refuse a target that is no packed linear layer, or a rank above all of them, before the weights are loaded."""
    packed = {
        name.removesuffix(".weight"): site.layout.shape
        for name, site in checkpoint.record.items()
        if site.kind not in ("experts", "embedding")
    }
    modules = [name.removesuffix(".weight") for name in checkpoint.parameters]
    chosen = {path: packed[path] for path in select_targets(list(packed), config.targets, modules)}
    check_rank(config.rank, chosen)


def _examples(source: tuple[str, ...], tokenizer: Any, config: FinetuneConfig) -> Examples:
    return load_examples(source, tokenizer, format=config.format, seq_len=config.seq_len)


def _pad_token_id(tokenizer: Any) -> int:
    """Any id will do: attention and labels mask it."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def _adapt(model: nn.Module, config: FinetuneConfig) -> LoRASettings | None:
    """Put the adapter on: a new one, or the one to go on with."""
    if config.adapter is None:
        settings = LoRASettings(
            config.rank,
            config.alpha,
            config.dropout,
            config.targets,
            config.seed,
            config.train_scales,
        )
        add_lora(model, settings)
        return settings
    load_adapter(model, config.adapter, trainable=True)
    for _, layer in adapter_layers(model):
        layer.dropout = config.dropout
    return None


def _nbytes(model: nn.Module) -> int:
    """Bytes that a run writes: the adapter, three checkpoints with AdamW's two moments, and small files."""
    adapter = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return adapter * (1 + 3 * 3) + 2**20


def _adapter_files(model: nn.Module, settings: LoRASettings | None) -> AdapterFiles:
    def save(folder: Path) -> None:
        save_adapter(model, folder, settings=settings)

    def restore(folder: Path) -> None:
        saved = AdapterFolder(folder)
        for path, layer in adapter_layers(model):
            set_adapter(layer, saved[path])

    return AdapterFiles(save, restore)


def _warn_if_worse(result: FinetuneResult, config: FinetuneConfig, vocabulary: int) -> None:
    worse = divergence(result.losses, result.eval_loss, vocabulary)
    if worse:
        logger.warning("%s: %s: the adapter makes the model worse; lower the learning rate (lr %g)",
                       result.out, worse, config.lr)  # fmt: skip


def _result(config: FinetuneConfig, outcome: Outcome, peak_memory_bytes: int) -> FinetuneResult:
    return FinetuneResult(
        out=config.out,
        steps=len(outcome.losses),
        losses=outcome.losses,
        eval_loss=outcome.eval_loss,
        seconds=outcome.seconds,
        tokens_per_second=outcome.tokens / outcome.seconds,
        peak_memory_bytes=peak_memory_bytes,
    )
