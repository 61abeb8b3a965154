"""Make an adapter that starts by correcting the quantizer's errors, in closed form.

    (W - Ŵ) L = U Σ Vᵀ, cut to rank r      s B A = U Σ Vᵀ L⁻¹      H = E[xxᵀ] = L Lᵀ

No other matrix of rank r makes E ‖(W - Ŵ - s B A) x‖² smaller (Zhang et al. 2024, QERA, arXiv
2410.06040, theorem 1; any L with H = L Lᵀ gives the same product). B and A each get Σ^½.

The walk of a calibration gives W and H of each layer, a decoder block of the dense model at a time.
The residual W - Ŵ never exists: a randomized SVD (Halko et al. 2011, arXiv 0909.4061, algorithms
4.4 and 5.1) only multiplies by it, with the quantizer's ``matmul``. So it works for any quantizer.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modulora_core.arguments import checked
from modulora_core.calibration import (
    BlockVisitor,
    BlockWalk,
    CalibrationConfig,
    CalibrationText,
    PackedMatrices,
    block_prefixes,
    calibration_text,
)
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import check_output, whole_or_nothing
from modulora_core.checkpoints.packing import random_stream
from modulora_core.distributed import pick_device, world_size
from modulora_core.errors import OptionError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.layers import LoRALayer, QuantLinear
from modulora_core.lora.adapted import adapter_layers, packed_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.models import ModelSource, open_dense
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.packed import PackedWeight
from modulora_core.progress import Display, Progress, shown
from modulora_core.spec import Calibration, Quantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CORRECTION_SAMPLES = 32
"""The most samples of text, if nothing else is asked for."""

OVERSAMPLING = 8
"""Columns beyond r in the randomized SVD."""

POWER_ITERATIONS = 2
"""Products by (W - Ŵ) L and its transpose that sharpen the randomized SVD."""

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean: few samples leave H singular."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    """An adapter that was made.

    Attributes:
        out: the folder of the adapter.
        layers: number of its layers; corrected: number of layers that don't begin at zero.
    """

    out: str
    layers: int
    corrected: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@checked
def init_adapter(
    model: str | Path,
    out: str | Path,
    *,
    dense: str | Path,
    calibration: CalibrationConfig,
    settings: LoRASettings | None = None,
    progress: Display = True,
) -> InitialAdapter:
    """Write an adapter that corrects the layers of a quantized model, as a start of training.

    ``finetune`` trains it further as its ``adapter``.
    Experts, an output head and layers without targets are not corrected: their B is zero.

    Args:
        model: a quantized model.
        out: the folder to write, new or empty.
        dense: the model before quantization. A decoder block of it is in memory at a time.
        calibration: the text of H.
        settings: the adapter's settings.
        progress: called with ``"correcting"``, the layers done, and their number; by default a bar
            on a terminal, and False shows none.

    Raises:
        OutputError: ``out`` holds files.
        OptionError: ``dense`` has other layers, or a run of several processes.
        RequestError: a model, the text or the settings cannot be used.
        WorkError: an input of a layer is NaN or Inf.
    """
    started, settings = time.perf_counter(), settings or LoRASettings()
    check_output(Path(out))
    with shown(progress, "correcting", "layers") as progress:
        checkpoint = open_packed(model)
        corrector = Corrector.open(dense, calibration, settings.seed)
        adapted = load_model(checkpoint, device=str(pick_device()))
        layers, corrected = corrector.put_on(adapted, checkpoint.name, settings, progress)
    with whole_or_nothing(Path(out)) as whole:
        save_adapter(adapted, whole, settings=settings)
    return InitialAdapter(str(out), layers, corrected, time.perf_counter() - started)


@dataclass(frozen=True)
class Corrector:
    """Puts an adapter that corrects its layers on a quantized model.

    Attributes:
        source: the dense model.
        text: the samples that H comes from.
    """

    source: ModelSource
    text: CalibrationText

    @classmethod
    def open(cls, dense: str | Path, calibration: CalibrationConfig, seed: int) -> Corrector:
        """Find the dense model and draw the text. Raises as :func:`init_adapter`."""
        if world_size() > 1:
            raise OptionError(f"a corrected adapter: expected one process, got {world_size()}")
        source = open_dense(str(dense))
        return cls(source, calibration_text(source, calibration, seed))

    def put_on(
        self, model: PreTrainedModel, name: str, settings: LoRASettings, progress: Progress
    ) -> tuple[int, int]:
        """Put a new adapter on a quantized model. Returns its layers, and the corrected ones.

        Args:
            model: loaded on the device of the run; name: for messages.
            progress: called with ``"correcting"``, the layers done, and their number.
        """
        inside = block_prefixes(self.source)
        packed = {
            f"{path}.weight" if isinstance(layer, QuantLinear) else path: layer
            for path, layer in packed_layers(model).items()
            if path.startswith(inside)
        }
        linears = _linears(self.source, name, {
            name: (layer.weight if isinstance(layer, QuantLinear) else layer.first).layout.shape
            for name, layer in packed.items()
        })  # fmt: skip
        weights: dict[str, tuple[Quantizer, list[PackedWeight]]] = {}
        for parameter, layer in packed.items():
            matrices = [layer.weight] if isinstance(layer, QuantLinear) else [*layer]
            weights[parameter] = matrices[0].quantizer, [matrix.packed for matrix in matrices]
        add_lora(model, settings)
        layers = {f"{path}.weight": layer for path, layer in adapter_layers(model)}
        linear = {parameter: layer for parameter, layer in layers.items() if parameter in weights}
        correcting = _Correcting(weights, linear, settings.seed, progress)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            walk = BlockWalk(
                self.source, self.text, linears, correcting, pick_device(), Path(folder)
            )
            walk.run()
        if len(correcting.done) < len(layers):
            logger.info(
                "%s: %d of %d layers begin at zero: experts, or layers outside of decoder blocks",
                name, len(layers) - len(correcting.done), len(layers),
            )  # fmt: skip
        return len(layers), len(correcting.done)


def _linears(
    source: ModelSource, name: str, packed: Mapping[str, tuple[int, ...]]
) -> list[LinearSite]:
    """The dense model's weights that are packed, with the shapes ``[out, in]`` of a matrix."""
    found = {site.name: site for site in find_sites(source.outline).linears}
    for parameter, shape in packed.items():
        site = found.get(parameter)
        here = None if site is None else (site.out_features, site.in_features)
        if here != shape:
            raise OptionError(
                f"dense {source.location.model}: expected the model that {name} was quantized "
                f"from, with {parameter} of {list(shape)}, got {list(here) if here else 'none'}"
            )
    return [found[parameter] for parameter in packed]


@dataclass(frozen=True, slots=True)
class _Corrected(PackedMatrices):
    """A packed parameter with its correction, ``[out, in]``, so that later layers see both."""

    correction: Tensor

    def values(self) -> Iterator[Tensor]:
        for value in PackedMatrices.values(self):
            yield value + self.correction


@dataclass
class _Correcting(BlockVisitor):
    """Sets A and B of each layer that the walk reaches.

    Attributes:
        weights: the quantizer and the packed matrices of every parameter.
        layers: the layers to correct, by parameter.
    """

    weights: Mapping[str, tuple[Quantizer, list[PackedWeight]]]
    layers: Mapping[str, LoRALayer]
    seed: int
    progress: Progress

    def __post_init__(self) -> None:
        self.done: list[str] = []

    def wants_calibration(self, name: str) -> bool:
        return name in self.layers

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> PackedMatrices:
        quantizer, packed = self.weights[name]
        if name not in self.layers:
            return PackedMatrices(name, quantizer, packed)
        [weight], [calibration] = matrices, [*calibrations]
        assert calibration is not None
        layer = self.layers[name]
        values, scale = layer.parameters_of("default"), layer.scale["default"] ** 0.5
        with random_stream(self.seed, name):
            B, A = best_correction(
                weight, quantizer, packed[0], calibration.hessian, rank=len(values["lora_A"])
            )
        # a layer narrower than the adapter's rank needs fewer columns of B; the others stay zero
        values["lora_B"].data[:, : len(A)] = B / scale
        values["lora_A"].data[: len(A)] = A / scale
        self.done.append(name)
        self.progress("correcting", len(self.done), len(self.layers))
        return _Corrected(name, quantizer, packed, B @ A)


def best_correction(
    weight: Tensor, quantizer: Quantizer, packed: PackedWeight, hessian: Tensor, *, rank: int
) -> tuple[Tensor, Tensor]:
    """B ``[out, r]`` and A ``[r, in]`` with the smallest E ‖(W - Ŵ - B A) x‖², nearly.

    r is ``rank``, or the smaller side of W if that is less.

    Args:
        weight: W, ``[out, in]``; packed: Ŵ; hessian: H, ``[in, in]``, fp32 or wider.
    """
    H = hessian.clone()
    H.diagonal().add_(DAMPING * H.diagonal().mean() + torch.finfo(H.dtype).tiny)
    L, W = torch.linalg.cholesky(H), weight.to(H.dtype)

    def times(x: Tensor) -> Tensor:
        """(W - Ŵ) L x, ``[in, n]`` to ``[out, n]``."""
        y = L @ x
        products: Tensor = W @ y - quantizer.matmul(y.t().contiguous(), packed).t()
        return products

    def transposed(x: Tensor) -> Tensor:
        """Lᵀ (W - Ŵ)ᵀ x, ``[out, n]`` to ``[in, n]``."""
        y = quantizer.matmul(x.t().contiguous(), packed, transpose=True).t()
        products: Tensor = L.t() @ (W.t() @ x - y)
        return products

    size = min(rank + OVERSAMPLING, *weight.shape)
    Q = _basis(times(torch.randn(weight.shape[1], size, dtype=H.dtype).to(H.device)))
    for _ in range(POWER_ITERATIONS):
        Q = _basis(times(_basis(transposed(Q))))
    U, S, Vt = torch.linalg.svd(transposed(Q).t(), full_matrices=False)
    root = S[:rank].sqrt()
    A = torch.linalg.solve_triangular(L, root[:, None] * Vt[:rank], upper=False, left=False)
    return Q @ U[:, :rank] * root, A


def _basis(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns."""
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
