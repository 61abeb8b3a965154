"""vLLM's layers with packed weights.

    Shard                 rows and columns of one stored weight, as a rank of vLLM needs them
    JoinedWeight          the shards of a layer, whose outputs stand side by side
    PackedLinearMethod    a linear layer of vLLM, which may join q, k and v
    PackedTableMethod     an embedding or an output head with a packed weight
    TiedHeadMethod        an output head that shares the packed table of the embedding

A quantizer that can cut its weights (:meth:`modulora_core.spec.Quantizer.sliced`) gives each rank a
part. Other weights are whole on every rank: it keeps its rows of the product, or pads its columns
of the input with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.packed_parameters import PackedParameter
from modulora_core.spec import PackedWeight, Quantizer
from modulora_vllm.engine.threads import keep_threads, torch_defaults

logger = init_logger("vllm.modulora")

Range = tuple[int, int]

KNOWN = (
    ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear,
    RowParallelLinear,
)  # fmt: skip
"""The classes whose cut for tensor parallelism is known here."""


class Shard(nn.Module):
    """Rows and columns of one stored weight.

    Args:
        weight: the stored weight, packed or dense, on a CPU.
        quantizer: of a packed one.
        rows, columns: the part that this rank computes.
        dtype: of activations, and of a dense weight.
    """

    weight: PackedParameter | nn.Parameter

    def __init__(
        self, weight: PackedWeight | Tensor, quantizer: Quantizer | None, rows: Range,
        columns: Range, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        device = torch.empty(0).device  # vLLM loads within a block of its device
        self.rows, self.columns = rows, columns
        if quantizer is None or isinstance(weight, Tensor):
            dense: Tensor = weight[slice(*rows), slice(*columns)]  # type: ignore[index]
            self.weight = nn.Parameter(dense.to(device, dtype, copy=True), requires_grad=False)
            self.shape = (dense.shape[0], dense.shape[1])
            self.rows, self.columns = (0, self.shape[0]), (0, self.shape[1])
            return
        part = self._cut(quantizer, weight)
        # a part may be a view of the whole weight, which is not to stay
        own = {name: t.to(device, copy=part is not weight) for name, t in part.tensors.items()}
        self.weight = PackedParameter(quantizer, part.layout.fill(own), dtype=dtype)

    def _cut(self, quantizer: Quantizer, packed: PackedWeight) -> PackedWeight:
        """The part of this rank, as far as the quantizer can cut it."""
        for dim, (start, stop) in enumerate((self.rows, self.columns)):
            if (start, stop) == (0, packed.shape[dim]):
                continue
            part = quantizer.sliced(packed, dim, start, stop)
            if part is None:
                logger.warning_once(
                    "%s can't cut its weights of %s between processes: each keeps all %d bytes of "
                    "such a layer, instead of %d", packed.quantizer, str(list(packed.shape)),
                    packed.nbytes, packed.nbytes * (stop - start) // packed.shape[dim],
                )  # fmt: skip
            elif dim == 0:
                packed, self.rows = part, (0, stop - start)
            else:
                packed, self.columns = part, (0, stop - start)
        self.shape = packed.shape
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """``[..., rows]`` of ``x: [..., columns]``."""
        (out_features, in_features), (start, stop) = self.shape, self.columns
        if (start, stop) != (0, in_features):
            x = F.pad(x, (start, in_features - stop))
        if isinstance(self.weight, PackedParameter):
            y = self.weight.multiply(x)
        else:
            y = F.linear(x, self.weight)
        return y if self.rows == (0, out_features) else y[..., slice(*self.rows)]


class JoinedWeight(nn.Module):
    """The shards of a layer: its outputs stand side by side.

    Args:
        shards: from the first rows to the last.
        rows: the rows that vLLM expects; a vocabulary is padded with zeros.
        dtype: of activations.
    """

    def __init__(self, shards: Sequence[Shard], rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shards, self.padded_rows, self.dtype = nn.ModuleList(shards), rows, dtype

    @property
    def device(self) -> torch.device:
        """The device, for which LoRA layers of vLLM ask the weight."""
        return self.first.weight.device

    @property
    def first(self) -> Shard:
        return self.get_submodule("shards.0")  # type: ignore[return-value]

    def warm_up(self) -> None:
        """Multiply once on a CPU, which starts the threads of the kernels."""
        columns = self.first.columns[1] - self.first.columns[0]
        keep_threads(self, torch.zeros(1, columns, dtype=self.dtype, device=self.device))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., rows]`` of ``x: [..., in]``, in its dtype."""
        products = [shard(x) for shard in self.shards]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        missing = self.padded_rows - y.shape[-1]
        return F.pad(y, (0, missing)) if missing else y

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` of the one table, counted from this rank's first row."""
        table: PackedParameter = self.first.weight  # type: ignore[assignment]
        return table.quantizer.lookup(ids + self.first.rows[0], table.packed, dtype)


class _PackedMethod(LinearMethodBase):
    """The product with the weight that a subclass attaches."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.warm_up()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = multiply(layer, x)
        return y if bias is None else y + bias


class PackedLinearMethod(_PackedMethod):
    """A linear layer of vLLM, of which at least one stored weight is packed.

    Args:
        parameters: the names in memory of its weights, from the first rows to the last.
    """

    def __init__(self, checkpoint: PackedCheckpoint, parameters: Sequence[str]) -> None:
        self.checkpoint, self.parameters = checkpoint, parameters

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """Read the weights.

        Raises:
            CheckpointError: they have other shapes than vLLM's layer.
            ModelError: vLLM cuts this kind of layer in a way that is not known here.
        """
        if type(layer) not in KNOWN and layer.tp_size > 1:
            raise ModelError(
                f"{layer.prefix}: expected one process, or a layer that vLLM cuts as usual, got "
                f"{type(layer).__name__} on {layer.tp_size}; serve without tensor parallelism"
            )
        columns = (0, layer.input_size)
        if isinstance(layer, RowParallelLinear):
            start = layer.tp_rank * layer.input_size_per_partition
            columns = (start, start + layer.input_size_per_partition)
        shapes = [stored_shape(self.checkpoint, name) for name in self.parameters]
        rows, sizes = [n for n, _ in shapes], _piece_sizes(layer)
        if {n for _, n in shapes} != {layer.input_size} or sum(rows) != sum(sizes):
            raise CheckpointError(
                f"{layer.prefix}: expected weights of {sum(sizes)} rows and {layer.input_size} "
                f"columns in all by vLLM's code, got {shapes} of {', '.join(self.parameters)}"
            )
        shards = [
            _read(self.checkpoint, self.parameters[i], part, columns, layer.params_dtype)
            for i, part in _within(_rows_of_rank(layer, sizes), rows)
        ]
        _attach(layer, shards, self.parameters[0])


class PackedTableMethod(_PackedMethod):
    """An input embedding or an output head of vLLM with a packed weight."""

    def __init__(self, checkpoint: PackedCheckpoint, parameter: str) -> None:
        self.checkpoint, self.parameter = checkpoint, parameter

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """Read the weight.

        Raises:
            CheckpointError: it has another shape than vLLM's layer.
            ModelError: vLLM records CUDA graphs, and a lookup waits for its ids.
        """
        if not isinstance(layer, ParallelLMHead):
            refuse_graphs(self.parameter, "a packed embedding")
        shape, indices = stored_shape(self.checkpoint, self.parameter), layer.shard_indices
        if shape != (layer.org_vocab_size, layer.input_size):
            raise CheckpointError(
                f"{self.parameter}: expected {[layer.org_vocab_size, layer.input_size]} by vLLM's "
                f"code, got {list(shape)}"
            )
        rows = (indices.org_vocab_start_index, indices.org_vocab_end_index)
        columns = (0, layer.input_size)
        shard = _read(self.checkpoint, self.parameter, rows, columns, layer.params_dtype)
        _attach(layer, [shard], self.parameter)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            found: Tensor = torch.ops.modulora_vllm.lookup(
                ids, layer.packed_name, layer.embedding_dim, layer.params_dtype
            )
            return found
        rows: Tensor = layer.weight.lookup(ids, layer.params_dtype)
        return rows


class TiedHeadMethod(PackedTableMethod):
    """An output head of vLLM that shares the packed table of the embedding."""

    def __init__(self) -> None:
        pass

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """Nothing: :meth:`tie_weights` gives the head its weight."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.weight, layer.packed_name = embed_tokens.weight, embed_tokens.packed_name
        return layer


def stored_shape(checkpoint: PackedCheckpoint, parameter: str) -> tuple[int, int]:
    """``(out, in)`` of a stored matrix."""
    if parameter in checkpoint.record.weights:
        return checkpoint.record.site(parameter).layout.shape
    rows, columns = checkpoint.parameters[parameter].shape  # type: ignore[union-attr]
    return rows, columns


def _read(
    checkpoint: PackedCheckpoint, parameter: str, rows: Range, columns: Range, dtype: torch.dtype
) -> Shard:
    """Read a matrix, packed or dense."""
    with torch_defaults():
        if parameter not in checkpoint.record.weights:
            weight: PackedWeight | Tensor = checkpoint.tensor(parameter)
            quantizer = None
        else:
            (weight,) = checkpoint.packed(parameter)
            quantizer = checkpoint.quantizer(checkpoint.record.site(parameter))
            if not quantizer.spec.capturable:
                refuse_graphs(parameter, f"products of {quantizer.spec.name}")
    return Shard(weight, quantizer, rows, columns, dtype)


def refuse_graphs(parameter: str, part: str) -> None:
    """Raise ModelError if vLLM would record CUDA graphs with a part that waits for values."""
    if get_current_vllm_config().compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        raise ModelError(
            f"{parameter}: CUDA graphs can't record {part}; serve the model with --enforce-eager"
        )


def multiply(layer: Any, x: Tensor) -> Tensor:
    """The product of a layer without its bias: an operation where vLLM compiles."""
    weight: JoinedWeight = layer.weight
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.modulora_vllm.linear(x, layer.packed_name, weight.padded_rows)
        return y
    return weight(x)  # type: ignore[no-any-return]


def _attach(layer: Any, shards: Sequence[Shard], parameter: str) -> None:
    """Put the weight into the layer, and into vLLM's table of layers that operations look up."""
    weight = JoinedWeight(shards, sum(layer.output_partition_sizes), layer.params_dtype)
    layer.weight, layer.packed_name = weight, f"modulora.{parameter}"
    context = get_current_vllm_config().compilation_config.static_forward_context
    context[layer.packed_name] = weight


def _piece_sizes(layer: Any) -> list[int]:
    """The rows of each piece of a layer, of all ranks together."""
    if isinstance(layer, QKVParallelLinear) and type(layer) in KNOWN:
        q, kv = layer.total_num_heads, layer.total_num_kv_heads
        return [q * layer.head_size, kv * layer.head_size, kv * layer.v_head_size]
    sizes: list[int] = getattr(layer, "output_sizes", [layer.output_size])
    return sizes


def _rows_of_rank(layer: Any, sizes: Sequence[int]) -> list[Range]:
    """The rows of this rank among all rows of the layer's pieces; neighbours are joined."""
    ranges, first = list[Range](), 0
    for i, (size, part) in enumerate(zip(sizes, layer.output_partition_sizes, strict=True)):
        rank = layer.tp_rank if isinstance(layer, ColumnParallelLinear) else 0
        if isinstance(layer, QKVParallelLinear) and i > 0:
            rank //= layer.num_kv_head_replicas
        start = first + rank * part
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], start + part)
        else:
            ranges.append((start, start + part))
        first += size
    return ranges


def _within(ranges: Sequence[Range], sizes: Sequence[int]) -> Iterator[tuple[int, Range]]:
    """The weights that rows lie in, and where: ``sizes`` are the rows of the stored weights."""
    for start, stop in ranges:
        first = 0
        for i, size in enumerate(sizes):
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                yield i, (low, high)
            first += size


# --- torch's operations: compiled graphs name a layer, and look its weight up ------------------


def _linear(x: Tensor, layer: str, out_features: int) -> Tensor:
    del out_features
    y: Tensor = get_forward_context().no_compile_layers[layer](x)
    return y


def _lookup(ids: Tensor, layer: str, columns: int, dtype: torch.dtype) -> Tensor:
    del columns
    rows: Tensor = get_forward_context().no_compile_layers[layer].lookup(ids, dtype)
    return rows


_OPS = torch.library.Library("modulora_vllm", "DEF")
_OPS.define("linear(Tensor x, str layer, int out_features) -> Tensor")
_OPS.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake(
    "modulora_vllm::linear", lambda x, _, out: x.new_empty(*x.shape[:-1], out), lib=_OPS
)
_OPS.define("lookup(Tensor ids, str layer, int columns, ScalarType dtype) -> Tensor")
_OPS.impl("lookup", _lookup, "CompositeExplicitAutograd")
torch.library.register_fake(
    "modulora_vllm::lookup",
    lambda ids, _, columns, dtype: ids.new_empty(*ids.shape, columns, dtype=dtype),
    lib=_OPS,
)
