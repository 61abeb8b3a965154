"""Packed experts in vLLM: a product for each expert that a batch asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.errors import CheckpointError, ModelError
from modulora_vllm.engine.layers import JoinedWeight, Range, Shard, stored_shape
from modulora_vllm.engine.threads import torch_defaults

ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
"""Activations of ``[gates, ups]``, the order in which our checkpoints have their rows."""


class PackedExpertsMethod(FusedMoEMethodBase):
    """Experts of vLLM with packed weights: ``down(act(gate x) * up x)``.

    Each expert that a batch asks for multiplies its own tokens. vLLM runs the experts of a layer as
    one operation, which it does not compile.

    Args:
        gate_up: the name in memory of the gates and ups; down: of the down projections.

    Raises:
        ModelError: vLLM asks for adapters on experts, for other processes than tensor parallel
            ones, or for an activation or biases that this code lacks.
    """

    def __init__(self, layer: Any, checkpoint: PackedCheckpoint, gate_up: str, down: str) -> None:
        super().__init__(layer.moe_config)
        self.checkpoint, self.gate_up, self.down = checkpoint, gate_up, down
        refused = {
            "adapters": get_current_vllm_config().lora_config is not None,
            "expert parallelism": layer.moe_config.moe_parallel_config.use_ep,
            "biases": self.moe.has_bias,
            f"the activation {layer.activation.value}": layer.activation not in ACTIVATIONS,
            "router weights on inputs": layer.apply_router_weight_on_input,
        }
        for found in (name for name, is_asked in refused.items() if is_asked):
            raise ModelError(
                f"{gate_up}: packed experts are served without {found}; serve what `modulora "
                "merge` writes"
            )

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """Read the weights. Raises CheckpointError if they have other shapes than vLLM's layer."""
        hidden, part = layer.hidden_size, layer.intermediate_size_per_partition
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        expected = {self.gate_up: (2 * part * ranks, hidden), self.down: (hidden, part * ranks)}
        for name, shape in expected.items():
            if stored_shape(self.checkpoint, name) != shape:
                raise CheckpointError(
                    f"{name}: expected experts of {list(shape)} by vLLM's code, got "
                    f"{list(stored_shape(self.checkpoint, name))}"
                )
        own, second = (rank * part, (rank + 1) * part), part * ranks
        rows: list[Range] = [own, (second + own[0], second + own[1])]
        rows = rows if ranks > 1 else [(0, 2 * part)]
        layer.gate_up = self._read(self.gate_up, rows, (0, hidden), layer.params_dtype)
        layer.down = self._read(self.down, [(0, hidden)], own, layer.params_dtype)

    def _read(
        self, parameter: str, rows: list[Range], columns: Range, dtype: torch.dtype
    ) -> nn.ModuleList:
        """The weight of each expert."""
        with torch_defaults():
            quantizer = self.checkpoint.quantizer(self.checkpoint.record.site(parameter))
            weights = list(self.checkpoint.packed(parameter))
        found = []
        for packed in weights:
            shards = [Shard(packed, quantizer, part, columns, dtype) for part in rows]
            found.append(JoinedWeight(shards, sum(stop - start for start, stop in rows), dtype))
        return nn.ModuleList(found)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's kernels get nothing."""

    def process_weights_after_loading(self, layer: Any) -> None:
        for weight in (layer.gate_up[0], layer.down[0]):
            weight.warm_up()

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        y = torch.zeros_like(x)
        for expert in topk_ids.unique().tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            both = layer.gate_up[expert](x[token])  # [tokens, 2 · intermediate]
            hidden = both.new_empty(len(both), both.shape[1] // 2)
            apply_moe_activation(layer.activation, hidden, both)
            weight = topk_weights[token, slot, None].to(x.dtype)
            y.index_add_(0, token, layer.down[expert](hidden) * weight)
        return y
