"""Tell vLLM which of its layers have packed weights.

vLLM makes a :class:`PackedConfig` of ``quantization_config`` in config.json, and asks it for the
method of every layer. A layer of vLLM may join several weights of the checkpoint: ``qkv_proj`` is
``q_proj``, ``k_proj`` and ``v_proj``. If one of them is packed, we read all of them from our opened
checkpoint (:mod:`modulora_vllm.engine.layers`). vLLM's loader reads the other tensors.

Three names of a weight meet here:

    in memory    transformers' name of the parameter, as our record has it
    stored       the name in the model's own checkpoint, which vLLM's code expects
    vLLM's       the name after ``hf_to_vllm_mapper``; a layer's prefix is part of it
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from modulora_core.errors import ModelError

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint

REORDERED = ("bloom", "falcon", "llama4", "llama4_text")
"""Model types of which vLLM reorders the rows of dense weights while it loads them."""


@cache
def open_checkpoint(model: str, revision: str | None) -> PackedCheckpoint:
    """Open a packed folder once in each process, and check that it is whole.

    Raises:
        RequestError: a file is missing or damaged, files and config.json differ, or a quantizer
            isn't installed.
    """
    from modulora_core.checkpoints.opening import open_packed
    from modulora_vllm.engine.threads import torch_defaults

    with torch_defaults():
        checkpoint = open_packed(model, revision=revision)
        checkpoint.check_plugins()
        checkpoint.check_whole()
    return checkpoint


class PackedConfig(QuantizationConfig):
    """The quantization of a packed folder, for vLLM. It is pickled into vLLM's workers.

    Args:
        method: the folder's ``quant_method``.
    """

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method, self.model = method, ""
        self.revision: str | None = None
        self._mappers: list[WeightsMapper] = []
        self._names: dict[str, str] = {}
        self._read: set[str] = set()

    def get_name(self) -> Any:
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70  # Triton's

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        return cls(config["quant_method"])

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Remember the folder. A folder that can't be served is refused before any weight is read.

        Raises:
            ModelError: vLLM's code for this model reorders rows, which packed weights can't follow.
            RequestError: as :func:`open_checkpoint`.
        """
        self.model, self.revision = model_name, revision
        model_type = getattr(hf_config, "model_type", None)
        if model_type in REORDERED:
            raise ModelError(
                f"model {model_name}: vLLM reorders the rows of {model_type} weights, which packed "
                "weights can't follow; serve what `modulora merge` writes"
            )
        self.checkpoint  # noqa: B018  # opens and checks it

    @property
    def checkpoint(self) -> PackedCheckpoint:
        return open_checkpoint(self.model, self.revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        if hf_to_vllm_mapper not in self._mappers:
            self._mappers.append(hf_to_vllm_mapper)
            self._names = {}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from modulora_vllm.engine import layers

        if isinstance(layer, LinearBase):
            names = self._parameters(prefix)
            if not self._is_packed(names):
                return UnquantizedLinearMethod()
            return layers.PackedLinearMethod(self.checkpoint, names)
        if isinstance(layer, ParallelLMHead):
            names = self._parameters(prefix.lstrip("."))
            if self._is_packed(names):
                return layers.PackedTableMethod(self.checkpoint, names[0])
            return layers.TiedHeadMethod() if self._has_packed_tied_head() else None
        if isinstance(layer, VocabParallelEmbedding):
            name = self._table(layer, prefix)
            return None if name is None else layers.PackedTableMethod(self.checkpoint, name)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        return None

    def _experts(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of experts; None if they are dense."""
        names = [
            name
            for name, site in self.checkpoint.record.items()
            if site.experts and self._vllm_name(name).startswith(f"{prefix}.")
        ]
        if not names:
            return None
        gate_up, down = (
            next((name for name in names if name.endswith(f".{part}")), None)
            for part in ("gate_up_proj", "down_proj")
        )
        if gate_up is None or down is None:
            raise ModelError(
                f"{prefix}: expected gate_up_proj and down_proj packed, got {', '.join(names)}; "
                "serve what `modulora merge` writes"
            )
        from modulora_vllm.engine.experts import PackedExpertsMethod

        self._read.update(names)
        return PackedExpertsMethod(layer, self.checkpoint, gate_up, down)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Keep packed tensors and guards from vLLM's loader, and rename dense tensors as stored.

        vLLM calls it once its layers exist.

        Raises:
            ModelError: no layer of vLLM takes a packed weight.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        self._check_all_read()
        record = self.checkpoint.record
        base, in_memory = re.escape(record.base), {*record.weights, *self._read}
        vllms = self._by_vllm_name().items()
        names = in_memory | {name for name, parameter in vllms if parameter in in_memory}
        names |= {self._stored_name(parameter) for parameter in in_memory}
        modules = {name.removesuffix(".weight").removeprefix(record.base) for name in names}
        ours = "|".join(sorted(map(re.escape, modules)))
        regex: dict[Any, str | None] = {
            re.compile(rf"^(?:{base})?(?:{ours})(?:\.(?!bias$)|$)"): None
        }
        for name in self.checkpoint.parameters.keys() - in_memory:
            first, *others = stored_names(self.model, self.revision, name)
            if others:
                raise ModelError(
                    f"{name}: expected it packed, got one dense tensor, and vLLM's code expects "
                    f"{len(others) + 1}; serve what `modulora merge` writes"
                )
            if first != name:
                regex[re.compile(f"^{re.escape(name)}$")] = first
        return WeightsMapper(orig_to_new_regex=regex)

    def _parameters(self, prefix: str) -> list[str]:
        """The names in memory of the weights that a layer of vLLM joins; [] if none is known."""
        parent, _, leaf = prefix.rpartition(".")
        parts, known = self.packed_modules_mapping.get(leaf, [leaf]), self._by_vllm_name()
        wanted = [f"{parent}.{part}.weight".lstrip(".") for part in parts]
        if wanted[0] not in known:
            wanted = [f"{prefix}.weight"]
        return [known[name] for name in wanted if name in known]

    def _is_packed(self, names: list[str]) -> bool:
        """Whether one of these parameters is packed; we then read all of them."""
        packed = not self.checkpoint.record.weights.keys().isdisjoint(names)
        if packed:
            self._read.update(names)
        return packed

    def _table(self, layer: Any, prefix: str) -> str | None:
        """The packed input embedding, if ``layer`` is it. Some models of vLLM give no prefix."""
        for name, site in self.checkpoint.record.items():
            shape = (layer.org_vocab_size, layer.embedding_dim)
            named = prefix == "" or self._parameters(prefix) == [name]
            if site.kind == "embedding" and named and site.layout.shape == shape:
                self._read.add(name)
                return name
        return None

    def _has_packed_tied_head(self) -> bool:
        from modulora_core.layers import TiedHead

        return isinstance(self.checkpoint.outline.get_output_embeddings(), TiedHead)

    def _by_vllm_name(self) -> dict[str, str]:
        """The name in memory of each matrix, by vLLM's name."""
        if not self._names:
            self._names = {self._vllm_name(name): name for name in self._matrices()}
        return self._names

    def _vllm_name(self, parameter: str) -> str:
        """The name of vLLM; of experts, of the first matrix."""
        name = self._stored_name(parameter)
        for mapper in self._mappers:
            name = mapper.map_name(name) or name
        return name

    def _matrices(self) -> Iterator[str]:
        for name, found in self.checkpoint.parameters.items():
            shape = getattr(found, "parameter_shape", None) or found.shape  # type: ignore[union-attr]
            if len(shape) == 2:
                yield name

    def _stored_name(self, parameter: str) -> str:
        return stored_names(self.model, self.revision, parameter)[0]

    def _check_all_read(self) -> None:
        from vllm.distributed import get_pp_group

        left = sorted(self.checkpoint.record.weights.keys() - self._read)
        if left and get_pp_group().world_size == 1:
            raise ModelError(
                f"{left[0]}: expected a layer of vLLM for this packed weight, and vLLM's code for "
                f"{self.checkpoint.config.get('architectures')} has none ({len(left)} of "
                f"{len(self.checkpoint.record.weights)}); serve what `modulora merge` writes"
            )


@cache
def stored_names(model: str, revision: str | None, parameter: str) -> tuple[str, ...]:
    """The name of a parameter in the model's own checkpoint, or of its parts there."""
    from modulora_vllm.export import stored_parts

    checkpoint = open_checkpoint(model, revision)
    found = checkpoint.parameters[parameter]
    shape = getattr(found, "parameter_shape", None) or found.shape  # type: ignore[union-attr]
    parts = stored_parts(checkpoint.outline, parameter, torch.empty(shape, device="meta"))
    return tuple(parts)
