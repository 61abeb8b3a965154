"""Training and decoding without numbers: the code that trains runs on fake tensors, and its bytes are counted.

What autograd keeps of a model's attention, norms and activations is thus known for every architecture, with no formula for any. Of
blocks that are all alike three are rehearsed, the first, the last and one between, which counts as often as the model has it
(:mod:`modulora_core.planner.timeline`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modulora_core.adapters.lora import LoRASettings, add_lora
from modulora_core.errors import ModelError
from modulora_core.layers import PackedParameter
from modulora_core.models.quiet import quiet
from modulora_core.planner.ledger import Ledger
from modulora_core.planner.overhead import HEAP_BLOCK
from modulora_core.planner.request import PlanRequest
from modulora_core.planner.stand_ins import Assumed, RehearsedQuantizer, rehearse_attention
from modulora_core.planner.subject import Subject
from modulora_core.planner.timeline import Timeline
from modulora_core.tiles import ACCELERATOR_TILE_BYTES, CPU_TILE_BYTES, tile_budget
from modulora_core.training.chunked_loss import chunked_loss
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.gradient_checkpointing import checkpoint_activations

_OWN = frozenset({"layer_idx", "layer_id", "layer_number", "training"})
"""Attributes in which blocks that do the same differ."""

MIDDLE = 1
"""The number of the block that stands for all between the first and the last."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a rehearsal told.

    Attributes:
        timeline: bytes beside the weights, the adapter and the optimizer's states.
        adapter: trained values of the whole model.
        largest_adapter: of the largest trained parameter.
        kept: bytes that stay afterwards: for decoding those of the cache.
        largest: bytes of the largest tensor that a CPU's heap takes (:mod:`modulora_core.planner.overhead`).
    """

    timeline: Timeline
    adapter: int = 0
    largest_adapter: int = 0
    kept: int = 0
    largest: int = 0


def rehearse_training(subject: Subject, request: PlanRequest) -> Rehearsal:
    """A forward and a backward of the run.

    Raises:
        ModelError: the model can't be run without numbers.
        AdapterError: a target is no packed layer.
    """
    config = request.config
    model: Any = subject.skeleton(getattr(torch, request.dtype))
    settings = LoRASettings(rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets=config.targets,
                            train_scales=config.train_scales)  # fmt: skip
    with quiet():
        add_lora(model, settings)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    model.config.use_cache = False
    if config.gradient_checkpointing:
        checkpoint_activations(model, products=config.keep_products)
    model.train()
    with _stage(model, subject, request, config.batch_size) as stage:
        _watch_gradients(model, stage.ledger, config)
        stage.ledger.begin("start")
        with (
            chunked_loss(model),
            _offloaded(model) if config.offload_activations else nullcontext(),
        ):
            loss = model(**stage.batch, labels=stage.batch["input_ids"]).loss
        loss.backward()
        del loss
        stage.ledger.end()
    return Rehearsal(stage.timeline, sum(trained), max(trained), largest=stage.ledger.largest)


def rehearse_decoding(subject: Subject, request: PlanRequest) -> Rehearsal:
    """A prompt as long as the sequences of the run, and the first token after it.

    Raises:
        ModelError: the model can't be run without numbers.
    """
    model: Any = subject.skeleton(getattr(torch, request.dtype))
    model.requires_grad_(False)
    model.eval()
    with _stage(model, subject, request, 1) as stage, torch.no_grad():
        # transformers' generate() asks for the logits of the last token alone
        last = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        stage.ledger.begin("start")
        cache = model(**stage.batch, use_cache=True, **last).past_key_values
        stage.ledger.end()
        kept = sum(t.untyped_storage().nbytes() for t in _tensors_of(cache))
    blocks = stage.times + (stage.blocks - 1)
    return Rehearsal(
        stage.timeline, kept=kept * blocks // stage.blocks, largest=stage.ledger.largest
    )


@dataclass
class _Stage:
    ledger: Ledger
    batch: dict[str, Tensor]
    blocks: int
    times: int

    @property
    def timeline(self) -> Timeline:
        repeated = frozenset({f"forward {MIDDLE}", f"backward {MIDDLE}"})
        return Timeline(tuple(self.ledger.segments), repeated, self.times)


@contextmanager
def _stage(model: Any, subject: Subject, request: PlanRequest, batch_size: int) -> Iterator[_Stage]:
    """Inside, ``model`` is on fake tensors, and the ledger runs."""
    times = _shorten(model, subject.blocks)
    blocks = list(model.get_submodule(subject.blocks).children())
    rehearse_attention(model, padded=request.padded)
    on_cpu = request.device == "cpu"
    shape = (batch_size, request.config.seq_len)
    try:
        with (
            quiet(),
            FakeTensorMode(allow_non_fake_inputs=True),
            tile_budget(CPU_TILE_BYTES if on_cpu else ACCELERATOR_TILE_BYTES),
        ):
            model.to_empty(device="cpu")
            model.tie_weights()
            batch = {
                name: torch.zeros(shape, dtype=torch.int64)
                for name in ("input_ids", "attention_mask")
            }
            ledger = Ledger([*model.parameters(), *model.buffers(), *batch.values()], HEAP_BLOCK)
            for module in model.modules():
                if isinstance(module, PackedParameter):
                    module.quantizer = RehearsedQuantizer(module.quantizer, ledger)
            _Marks(ledger, blocks)
            with ledger, Assumed(model):
                yield _Stage(ledger, batch, len(blocks), times)
    except (
        RuntimeError,
        NotImplementedError,
        TypeError,
        ValueError,
    ) as error:  # what fake tensors can't do, torch tells in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {subject.name}: {type(model).__name__} can't be run without its weights, so its activations "
                         f"aren't known: {reason}") from error  # fmt: skip


def _shorten(model: Any, path: str) -> int:
    """Leave three blocks of a model whose blocks are all alike. Returns how often the one in the middle stands in the whole model."""
    blocks = list(model.get_submodule(path).children())
    if len(blocks) <= MIDDLE + 2 or len({_kind(block) for block in blocks}) > 1:
        return 1
    model.set_submodule(path, nn.ModuleList(blocks[: MIDDLE + 2]))
    return len(blocks) - 2


def _kind(block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks that do the same: types, shapes and plain attributes of everything in them."""
    parts: list[object] = []
    for path, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str) and key not in _OWN
        }
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = [
            (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
            for name, tensor in tensors
        ]
        parts.append((path, type(module), tuple(sorted(plain.items())), tuple(shapes)))
    return tuple(parts)


def _watch_gradients(model: nn.Module, ledger: Ledger, config: FinetuneConfig) -> None:
    def arrived(parameter: Tensor) -> None:
        if config.apply_gradients_at_once:
            parameter.grad = None
        elif parameter.grad is not None:
            ledger.call_it(parameter.grad, "gradients")

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived)


def _offloaded(model: nn.Module) -> Any:
    """What the forward keeps takes no memory until the backward asks for it, as with ``offload_activations``, but for the model's own."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def drop(tensor: Tensor) -> Tensor | tuple[torch.Size, torch.dtype, torch.device]:
        if tensor.untyped_storage()._cdata in own:
            return tensor
        return tensor.shape, tensor.dtype, tensor.device

    def bring(kept: Tensor | tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return torch.empty(kept[0], dtype=kept[1], device=kept[2])

    return torch.autograd.graph.saved_tensors_hooks(drop, bring)


def _tensors_of(cache: Any) -> list[Tensor]:
    """Keys and values of transformers' caches, and the states of layers that have others."""
    layers = getattr(cache, "layers", [])
    found = {
        id(value): value
        for layer in layers
        for value in vars(layer).values()
        if isinstance(value, Tensor)
    }
    return list(found.values())


class _Marks:
    """Cuts a ledger's time where blocks begin and end: forwards, in the loss, and backwards.

    A block that is checkpointed runs again in the backward: that is a part of its backward.
    """

    def __init__(self, ledger: Ledger, blocks: Sequence[nn.Module]) -> None:
        self._ledger, self._in_blocks = ledger, True
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entered(number), with_kwargs=True)
        blocks[-1].register_forward_hook(self._left(len(blocks) - 1))

    def _entered(self, number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._in_blocks:
                return
            self._ledger.begin(f"forward {number}")
            self._when_backward_reaches(args[0] if args else kwargs["hidden_states"], number - 1)

        return hook

    def _left(self, number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if not self._in_blocks:
                return
            self._in_blocks = False
            self._ledger.begin("loss", "loss")
            self._when_backward_reaches(output if isinstance(output, Tensor) else output[0], number)

        return hook

    def _when_backward_reaches(self, hidden: Tensor, number: int) -> None:
        """Its gradient is there: the backward of block ``number`` begins, or of what is before the first."""
        if hidden.requires_grad:
            hidden.register_hook(
                lambda _: self._ledger.begin(f"backward {number}" if number >= 0 else "end")
            )
