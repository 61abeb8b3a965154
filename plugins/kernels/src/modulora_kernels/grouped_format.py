"""Folders whose quantization config describes groups of layers, as compressed-tensors writes it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from modulora_core.errors import ModelError
from modulora_core.models.formats import CheckpointFormat, StoredWeight

HEAD = "lm_head"
"""transformers' name of a language model's head."""

ALL_LINEAR = ("Linear",)
"""The target of a group that holds every linear layer."""


class GroupedFormat(CheckpointFormat):
    """A format that is read and written, with a config of groups of layers."""

    conv1d = False  # the groups' targets are instances of nn.Linear

    def check(self, config: Mapping[str, Any]) -> None:
        sparse = config.get("sparsity_config") or {"format": "dense"}
        form = sparse.get("format") if isinstance(sparse, Mapping) else sparse
        if form != "dense":
            raise ModelError(
                f"{self.spec.quant_methods[0]} config: expected dense weights, got {form!r:.60}, "
                "which is not implemented; quantize the original model"
            )

    @abstractmethod
    def groups(
        self, weights: list[StoredWeight]
    ) -> Sequence[tuple[Sequence[str], Mapping[str, Any]]]:
        """The groups of ``weights``: module names or :data:`ALL_LINEAR`, and the facts of each."""

    def config(self, weights: list[StoredWeight], kept: list[str]) -> dict[str, Any]:
        groups = {
            f"group_{number}": {
                "targets": list(targets), "weights": dict(facts), "input_activations": None,
                "output_activations": None, "format": self.spec.name,
            }
            for number, (targets, facts) in enumerate(self.groups(weights))
        }  # fmt: skip
        # a tied head is not stored, and so not kept
        ignored = sorted({*kept, HEAD} - {weight.module for weight in weights})
        return {
            "quant_method": self.spec.quant_methods[0], "format": self.spec.name,
            "quantization_status": "compressed", "config_groups": groups, "ignore": ignored,
        }  # fmt: skip
