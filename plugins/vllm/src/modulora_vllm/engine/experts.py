"""Packed experts in vLLM: a product for each expert that a batch asks for, with adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.modular_kernel import (
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    FusedMoEKernel,
)
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.errors import CheckpointError, ModelError
from modulora_vllm.engine.layers import JoinedWeight, Range, Shard, refuse_graphs, stored_shape
from modulora_vllm.engine.threads import torch_defaults

ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
"""Activations of ``[gates, ups]``, the order in which our checkpoints have their rows."""


class PackedExperts(LoRAExpertsMixin, FusedMoEExpertsModular):
    """The experts of a layer in vLLM's modular kernel: ``down(act(gate x) * up x)``.

    Each expert that a batch asks for multiplies its own tokens. vLLM gives A and B of all adapters,
    as ``[slot, expert, ...]``, and the slot of each token, by ``_lora_context``.

    Args:
        layer: of vLLM, with the weights ``gate_up`` and ``down`` of each expert.
    """

    expects_unquantized_inputs = True

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.moe_config, FUSED_MOE_UNQUANTIZED_CONFIG)
        self.gate_up, self.down = layer.gate_up, layer.down

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def workspace_shapes(self, M: int, N: int, K: int, *_: Any) -> Any:
        """No memory of vLLM's but the output's, ``[tokens, hidden]``."""
        del N
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduceNoOP:
        return TopKWeightAndReduceNoOP()

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor,
        topk_ids: Tensor, activation: MoEActivation, *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        """Write the weighted sum of each token's experts into ``output``."""
        del w1, w2
        output.zero_()
        for expert in topk_ids.unique().tolist():
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            x = hidden_states[token]
            both = self.gate_up[expert](x)  # [tokens, 2 · intermediate]
            self._adapt(both, x, token, expert, "w13")
            hidden = both.new_empty(len(both), both.shape[1] // 2)
            self.activation(activation, hidden, both)
            y = self.down[expert](hidden)
            self._adapt(y, hidden, token, expert, "w2")
            output.index_add_(0, token, y * topk_weights[token, choice, None].to(y.dtype))

    def _adapt(self, y: Tensor, x: Tensor, token: Tensor, expert: int, weight: str) -> None:
        """Add ``B A x`` of each token's adapter to ``y``, in place."""
        found = self._lora_context
        if found is None:
            return
        # an item for each of the matrices that stand on top of each other
        A, B = (getattr(found, f"{weight}_lora_{each}_stacked") for each in "ab")
        slots = found.punica_wrapper.token_lora_indices[token]
        for slot in slots[slots >= 0].unique().tolist():  # -1: no adapter
            rows = slots == slot
            parts = [
                x[rows].to(a.dtype) @ a[slot, expert].T @ b[slot, expert].T
                for a, b in zip(A, B, strict=True)
            ]
            y[rows] += torch.cat(parts, dim=-1).to(y.dtype)

    # vLLM asks these while it chooses between classes, and this one isn't chosen

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(*_: Any) -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(*_: Any) -> bool:
        return False


class PackedExpertsMethod(FusedMoEMethodBase):
    """Experts of vLLM with packed weights. vLLM runs them as one operation, and compiles none.

    Args:
        gate_up: the name in memory of the gates and ups; down: of the down projections.

    Raises:
        ModelError: vLLM would record CUDA graphs, which can't ask for the chosen experts. Or it
            asks for expert parallelism, for adapters that are cut or shared between experts, or for
            an activation or biases that this code lacks.
    """

    def __init__(self, layer: Any, checkpoint: PackedCheckpoint, gate_up: str, down: str) -> None:
        super().__init__(layer.moe_config)
        self.checkpoint, self.gate_up, self.down = checkpoint, gate_up, down
        refuse_graphs(gate_up, "packed experts")
        lora = get_current_vllm_config().lora_config
        refused = {
            "fully sharded adapters": lora is not None and lora.fully_sharded_loras,
            "adapters that experts share": lora is not None and lora.enable_moe_shared_loras,
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

    def get_fused_moe_quant_config(self, *_: Any) -> Any:
        """The config of dense weights: vLLM's code around the experts sees no packed ones."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def process_weights_after_loading(self, layer: Any) -> None:
        for weight in (layer.gate_up[0], layer.down[0]):
            weight.warm_up()
        experts = len(layer.gate_up)
        rows, hidden = layer.gate_up[0].padded_rows, layer.hidden_size
        empty = torch.empty(1, device=layer.down[0].device)
        # vLLM asks for the shapes and the device of these two, and never for a value
        layer.w13_weight = empty.expand(experts, rows, hidden)
        layer.w2_weight = empty.expand(experts, hidden, rows // 2)
        self.moe_kernel = FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), PackedExperts(layer))

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any
    ) -> Any:
        assert self.moe_kernel is not None
        return self.moe_kernel.apply(
            x, layer.w13_weight, layer.w2_weight, topk_weights, topk_ids, layer.activation,
            layer.global_num_experts, layer.expert_map, layer.apply_router_weight_on_input,
        )  # fmt: skip
