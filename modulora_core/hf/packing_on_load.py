"""Quantize a dense model while transformers loads it, one parameter at a time.

transformers reads a parameter, casts it to the model's dtype, fuses experts, and hands it to
:class:`PackOnLoad`. It drops the dense values when the packed ones are in their place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from modulora_core.checkpoints.packed_modules import install_parameter, use_dense_products
from modulora_core.checkpoints.packing import pack_matrices
from modulora_core.checkpoints.record import QuantizationRecord, Recipe, by_reason, packed_sites
from modulora_core.errors import CheckpointError, OptionError, WeightError
from modulora_core.models.sites import find_sites, tied_to
from modulora_core.models.skeleton import tied_names
from modulora_core.packed_parameters import PackedParameter, PackedStack
from modulora_core.registry import Choice
from modulora_core.spec import Quantizer
from modulora_core.version import VERSION


def data_free(choice: Choice) -> Quantizer:
    """The quantizer of a choice. Raises OptionError, PluginError: it can't be used here."""
    quantizer = choice.create()
    if quantizer.spec.calibration == "required":
        raise OptionError(
            f"{choice.quantizer}: expected a quantizer that needs no calibration while loading; "
            "quantize the model first: modulora quantize MODEL OUT -q "
            f"{choice.quantizer} --calibration SOURCE"
        )
    return quantizer


class PackOnLoad(ConversionOps):
    """Packs parameters of a model on the meta device as they are read.

    Args:
        model: the skeleton that transformers is about to fill; its dense linear layers are replaced
            by :class:`~modulora_core.dense_products.DenseLinear`.
        quantizer: packs all linear weights of the base model.
        include, exclude: patterns, as of :func:`modulora_core.quantize`.
        seed: for random numbers of the quantizer.
    """

    def __init__(
        self, model: Any, quantizer: Quantizer, include: list[str], exclude: list[str], seed: int
    ) -> None:
        self.quantizer = quantizer
        self._damaged: list[str] = []
        found = find_sites(model, include, exclude)
        ties = {name: tied_to(other) for name, other in tied_names(model).items()}  # made later
        base = "" if include or model.base_model is model else f"{model.base_model_prefix}."
        new = {site.name: "a head" for site in found.linears if not site.name.startswith(base)}
        kept = {**found.dense, **new, **ties}
        linears = [site for site in found.linears if site.name not in kept]
        if not linears:
            raise OptionError(
                f"{type(model).__name__}: expected a linear weight or more to pack, found none"
            )
        sites, weights = packed_sites(linears, [quantizer], {site.name: 0 for site in linears})
        self.record = QuantizationRecord(
            core_version=VERSION,
            seed=seed,
            source=_source(model),
            recipes=(Recipe.of(quantizer),),
            sites=sites,
            weights=weights,
            kept=by_reason(kept),
        )
        use_dense_products(model, {linear.module for linear in linears})

    def convert(  # type: ignore[no-untyped-def]
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys=None, **_: Any
    ) -> dict[str, Tensor]:
        """Pack the parameters among ``input_dict``: name → value, or a list with the value."""
        filled: dict[str, Tensor] = {}
        for name, values in input_dict.items():
            dense = values[0] if isinstance(values, list) else values
            if name in self.record.weights:
                filled |= self._pack(model, name, dense)
                missing_keys.discard(name)
            else:
                filled[name] = dense
        return filled

    def _pack(self, model: nn.Module, name: str, dense: Tensor) -> dict[str, Tensor]:
        """Put packed modules on the meta device in the model's place, and return their tensors."""
        if not dense.isfinite().all():
            self._damaged.append(name)  # transformers would bury an exception in its report
            return {}
        site = self.record.site(name)
        matrices = site.matrices(dense)
        no_calibration = [None] * len(matrices)
        packed = pack_matrices(
            name, site, self.quantizer, matrices, no_calibration, seed=self.record.seed
        )
        install_parameter(model, name, site, self.quantizer)
        return {
            f"{prefix}.{key}": tensor
            for prefix, matrix in zip(site.prefixes(name), packed, strict=True)
            for key, tensor in matrix.tensors.items()
        }

    def check_complete(self, model: nn.Module) -> None:
        """Refuse a model whose files lack a parameter (transformers makes it up) or damage it."""
        for name in self._damaged:
            raise WeightError(
                f"{name}: expected finite values, got NaN or Inf; the file is damaged, or the "
                "training that wrote it diverged"
            )
        for name in self.record.weights:
            path, _, leaf = name.rpartition(".")
            if not isinstance(
                getattr(model.get_submodule(path), leaf), PackedParameter | PackedStack
            ):
                raise CheckpointError(
                    f"{name}: expected its values in the model's files, found none; load the model "
                    "with the class that wrote it"
                )


def _source(model: Any) -> dict[str, Any]:
    """The model's origin for the record; its values are not read for a fingerprint."""
    name = str(model.config.name_or_path)
    if Path(name).is_dir():
        return {"kind": "folder", "name": Path(name).resolve().name, "revision": None}
    revision = getattr(model.config, "_commit_hash", None)
    return {"kind": "hub", "name": name, "revision": revision}
