"""Rehearse a training step or a prompt on fake tensors, and count the bytes that torch allocates.

The code that trains runs: the model's forward, our layers, their backward, the chunked loss. Its
tensors have shapes and no memory. So the planner needs no formula for attention or a norm. One
block of each kind runs; :class:`Rehearsal` replays it as often as the model has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modulora_core.errors import ModelError
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.models.config import vocabulary_of
from modulora_core.packed_parameters import PackedParameter, PackedStack
from modulora_core.progress import quiet
from modulora_core.training.chunked_loss import CHUNK_BYTES_CPU, CHUNK_BYTES_GPU, chunked_loss
from modulora_core.training.gradient_checkpointing import checkpoint_activations
from modulora_planner.byte_counts import ByteCounter, Bytes, Segment, plus
from modulora_planner.model import PlannedModel
from modulora_planner.request import PlanRequest

_OWN = frozenset({"layer_idx", "layer_id", "layer_number", "number", "training"})
"""Attributes in which blocks of one kind differ."""

_ATTENTION = "modulora_rehearsal"
"""The name of the rehearsed attention in transformers."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The bytes of one step, beside the weights, the adapter and the optimizer's states.

    Attributes:
        segments: by name: ``start``, ``forward 0``, ``loss``, ``backward 0``, ``end``. The number
            counts the kinds of blocks.
        kinds: the kind of each block of the model, in order.
        trained: the number of values of each trained parameter.
        cache: bytes of the keys and values that stay after a prompt.
    """

    segments: Mapping[str, Segment]
    kinds: tuple[int, ...]
    trained: tuple[int, ...] = ()
    cache: int = 0

    def peak(self) -> tuple[str, Bytes]:
        """Replay the step with all blocks. Give the segment with most bytes, and these bytes."""
        forwards = [f"forward {kind}" for kind in self.kinds]
        backwards = [f"backward {kind}" for kind in reversed(self.kinds)]
        alive, best = Bytes(), ("start", Bytes())
        for name in ("start", *forwards, "loss", *backwards, "end"):
            if name in self.segments:
                peak = plus(alive, self.segments[name].peak)
                best = max(best, (name, peak), key=lambda named: named[1].total())
                alive = plus(alive, self.segments[name].change)
        return best


def rehearse_training(packed: PlannedModel, request: PlanRequest) -> Rehearsal:
    """Rehearse the forward and the backward of one batch.

    Raises:
        ModelError: the model cannot run without its weights.
        AdapterError: a target is no packed layer.
    """
    config, chunk = request.config, CHUNK_BYTES_CPU if request.device == "cpu" else CHUNK_BYTES_GPU
    settings = LoRASettings(
        config.rank, config.alpha, config.dropout, config.targets, train_scales=config.train_scales
    )
    stage = _stage(packed, getattr(torch, request.dtype), settings)
    model = deepcopy(stage.model)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        checkpoint_activations(model, keep_products=config.keep_products)
    model.train()
    with _running(packed, model, stage, request, config.batch_size) as (counter, batch):
        # two chunks of logits have the peak of all
        counter.most_labels = 2 * max(1, chunk // (4 * vocabulary_of(model.config)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda trained: counter.call_it(trained.grad, "gradients")
                )
        # as with save_on_cpu, saved tensors take no memory until the backward reads them
        offloading = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (tensor.shape, tensor.dtype),
            lambda saved: torch.empty(saved[0], dtype=saved[1]),
        )
        with (
            chunked_loss(model, chunk),
            offloading if config.offload_activations else nullcontext(),
        ):
            loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        del loss
        counter.end()
    return Rehearsal(counter.segments, stage.kinds, stage.trained)


def rehearse_decoding(packed: PlannedModel, request: PlanRequest) -> Rehearsal:
    """Rehearse a prompt of ``seq_len`` tokens up to its first new token.

    Raises:
        ModelError: the model cannot run without its weights.
    """
    stage = _stage(packed, getattr(torch, request.dtype), None)
    model = deepcopy(stage.model).eval()
    # generate() asks for the last token's logits alone
    last = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"use_cache": True, **({"logits_to_keep": 1} if last else {})}
    with _running(packed, model, stage, request, 1) as (counter, batch):
        layers = getattr(model(**batch, **options).past_key_values, "layers", [])
        counter.end()
        caches = {kind: _nbytes(layer) for kind, layer in zip(stage.left, layers, strict=False)}
    cache = sum(caches.get(kind, 0) for kind in stage.kinds)
    return Rehearsal(counter.segments, stage.kinds, cache=cache)


def _nbytes(layer: object) -> int:
    """Bytes of the tensors of one layer of a cache."""
    storages = [v.untyped_storage() for v in vars(layer).values() if isinstance(v, Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True, slots=True)
class _Stage:
    """A model on the meta device, cut after the first block of the last new kind.

    Attributes:
        kinds: the kind of each block of the whole model.
        left: the kinds of the blocks that are left.
        reached: a gradient reaches the block, for each block.
        trained: the number of values of each trained parameter of the whole model.
    """

    model: Any
    kinds: tuple[int, ...]
    left: tuple[int, ...]
    reached: tuple[bool, ...]
    trained: tuple[int, ...]


@lru_cache(maxsize=8)
def _stage(packed: PlannedModel, dtype: torch.dtype, settings: LoRASettings | None) -> _Stage:
    model: Any = packed.skeleton(dtype).requires_grad_(False)
    if settings is not None:
        with quiet():
            add_lora(model, settings)
    trained = tuple(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = list(model.get_submodule(packed.blocks).children())
    known: dict[object, int] = {}
    kinds, reached = [], [False]
    for block in blocks:  # the backward ends at the first block with an adapter
        reached.append(reached[-1] or any(p.requires_grad for p in block.parameters()))
        kinds.append(known.setdefault((_kind(block), reached[-1]), len(known)))
    left = kinds.index(len(known) - 1) + 1
    model.set_submodule(packed.blocks, nn.ModuleList(blocks[:left]))
    return _Stage(model, tuple(kinds), tuple(kinds[:left]), tuple(reached[1:]), trained)


def _kind(block: nn.Module) -> tuple[object, ...]:
    """Describe a block: types, shapes and plain attributes of everything in it.

    The quantizer of a packed weight does not count: the operations are the same.
    """
    parts: list[object] = []
    for path, module in block.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, int | float | str) and name not in _OWN
        }
        tensors = module.named_parameters(recurse=False)
        shapes: list[object] = [(name, t.shape, t.dtype, t.requires_grad) for name, t in tensors]
        shapes = [module.shape] if isinstance(module, PackedParameter) else shapes
        parts.append((path, type(module), tuple(sorted(plain.items())), tuple(shapes)))
    return tuple(parts)


@contextmanager
def _running(
    packed: PlannedModel, model: Any, stage: _Stage, request: PlanRequest, batch_size: int
) -> Iterator[tuple[ByteCounter, dict[str, Tensor]]]:
    """Run ``model`` on fake tensors in this block while the counter counts. Yields a batch too."""
    _attend(model, padded=request.padded)
    names, shape = ("input_ids", "attention_mask"), (batch_size, request.config.seq_len)
    try:
        with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            model.tie_weights()
            batch = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
            before = [*model.parameters(), *model.buffers(), *batch.values()]
            counter = ByteCounter(before, torch.device(request.device))
            _mark(counter, list(model.get_submodule(packed.blocks).children()), stage)
            _share_tokens(counter, model)
            if stage.reached[0]:
                _begin_with_gradient(model)
            counter.begin("start")
            with counter:
                yield counter, batch
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model {packed.dense.name}: {type(model).__name__} can't run without its weights, so "
            f"its activations aren't known: {reason}"
        ) from error


def _attend(model: Any, *, padded: bool) -> None:
    """Let ``model`` make the attention mask that it would make for real tokens.

    A batch without padding needs none. transformers finds that in a mask's values, which fake
    tensors lack.
    """
    if model.config._attn_implementation != "sdpa":  # eager attention always has a mask
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def no_mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **kwargs | {"attention_mask": None})

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask if padded else no_mask)
    model.set_attn_implementation(_ATTENTION)


def _mark(counter: ByteCounter, blocks: list[nn.Module], stage: _Stage) -> None:
    """Cut the counter's time where blocks begin and end.

    A checkpointed block runs again in the backward. That belongs to its backward.
    """
    in_blocks = True

    def backward_follows(hidden: Tensor, name: str) -> None:
        def reached(gradient: Tensor) -> None:
            counter.call_it(gradient, "activations")
            counter.begin(name)

        if hidden.requires_grad:
            hidden.register_hook(reached)

    def entered(position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not in_blocks:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if position == 0 and not hidden.requires_grad:
            hidden = hidden.clone()  # like other blocks' inputs, a tensor that only the block holds
            args, kwargs = (
                ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})
            )
        counter.begin(f"forward {stage.left[position]}")
        before = f"backward {stage.left[position - 1]}" if position else "end"
        backward_follows(hidden, before)
        return args, kwargs

    def left(_block: nn.Module, _args: Any, output: Any) -> None:
        nonlocal in_blocks
        if in_blocks:
            in_blocks = False
            counter.begin("loss", "loss")
            hidden = output if isinstance(output, Tensor) else output[0]
            backward_follows(hidden, f"backward {stage.left[-1]}")

    for position, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, position=position: entered(position, args, kwargs),
            with_kwargs=True,
        )
    blocks[-1].register_forward_hook(left)


def _begin_with_gradient(model: Any) -> None:
    """Give the first block an input with a gradient, as the others have.

    A hook of the block comes too late: transformers before 5.24 has it within the checkpoint.
    """
    model.get_input_embeddings().register_forward_hook(
        lambda _, __, embedded: embedded + embedded.new_zeros((), requires_grad=True)
    )


def _share_tokens(counter: ByteCounter, model: nn.Module) -> None:
    """Give each expert of a mixture the same number of tokens."""

    def share(experts: int) -> Any:
        return lambda *_: setattr(counter, "experts", experts)

    for module in model.modules():
        for stack in [m for m in module.children() if isinstance(m, PackedStack)][:1]:
            module.register_forward_pre_hook(share(len(stack)))
            module.register_forward_hook(share(1))
