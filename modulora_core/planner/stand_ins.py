"""What runs in a rehearsal in the place of what needs numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from modulora_core.layers import PackedStack
from modulora_core.planner.ledger import Ledger
from modulora_core.planner.workspace import product_workspace
from modulora_core.spec import Calibration, PackedWeight, Quantizer
from modulora_core.tiles import tile_bytes

ATTENTION = "modulora_rehearsal"
"""The name under which transformers knows the attention of a rehearsal."""


class RehearsedQuantizer(Quantizer):
    """Stands for a quantizer: its products have shapes only, and allocate what the real one's would."""

    def __init__(self, quantizer: Quantizer, ledger: Ledger) -> None:
        self.spec = quantizer.spec  # type: ignore[misc]  # this object's own
        self.options = quantizer.options
        self._quantizer, self._ledger = quantizer, ledger

    def pack(self, weight: Tensor, calibration: Calibration | None = None) -> PackedWeight:
        raise NotImplementedError

    def dequantize_tile(
        self, packed: PackedWeight, rows: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return torch.empty(rows[1] - rows[0], packed.shape[1], dtype=dtype, device=packed.device)

    def lookup(self, ids: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        return torch.empty(*ids.shape, packed.shape[1], dtype=dtype, device=packed.device)

    def matmul(self, x: Tensor, packed: PackedWeight, transpose: bool = False) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        budget = tile_bytes(x.device)
        with _disable_current_modes():  # a real product, on real memory
            nbytes = product_workspace(
                self._quantizer, packed.shape, x.dtype, rows, budget, transpose
            )
        with self._ledger.counted_as("workspace"):
            room = x.new_empty(nbytes, dtype=torch.uint8)
        y = x.new_empty(*x.shape[:-1], packed.shape[1 if transpose else 0])
        del room  # it is there while the result is
        return y


class Assumed(TorchDispatchMode):
    """Answers what can't be known without numbers: every entry is one of those that are looked for, and nothing is a special case.

    But for the routing to experts: each of them gets the same number of tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._experts = 1
        for module in model.modules():
            stacks = [child for child in module.children() if isinstance(child, PackedStack)]
            if stacks:
                module.register_forward_pre_hook(partial(self._routes, len(stacks[0])))
                module.register_forward_hook(partial(self._routes, 1))

    def _routes(self, experts: int, *_: Any) -> None:
        self._experts = experts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # torch's signature
        if func is torch.ops.aten.nonzero.default:
            entries, dims = args[0].numel(), args[0].dim()
            # within experts a vector says which are hit, a matrix which tokens come to one
            found = (
                -(-entries // self._experts) if dims > 1 and entries != self._experts else entries
            )
            return args[0].new_empty((found, dims), dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def rehearse_attention(model: Any, *, padded: bool) -> None:
    """Let ``model`` use the attention that it uses in earnest, with the mask that it would make.

    For batches without padding transformers looks at the mask's values and then makes none, which it doesn't do with fake tensors.
    """
    if model.config._attn_implementation != "sdpa":  # eager attention always has a mask
        return
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **(kwargs if padded else kwargs | {"attention_mask": None}))

    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(ATTENTION, mask)
    model.set_attn_implementation(ATTENTION)
