"""Models of LLaMA's shapes with random weights, dense or packed. No large dense weight is packed.

A quantizer packs one small Gaussian matrix. The entries of a large packed tensor (codes, scales)
are drawn from the small one's, at random. So codes are as frequent as for Gaussian weights, and
products are as large as their inputs, for any quantizer. Such a model takes the time and memory of
a real one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from modulora_core import Quantizer
from modulora_core.checkpoints.outputs import check_disk_space, whole_or_nothing
from modulora_core.checkpoints.record import PackedSite, QuantizationRecord, Recipe
from modulora_core.models.sites import LinearSite, find_sites
from modulora_core.models.skeleton import build_skeleton
from modulora_core.progress import Progress
from modulora_core.spec import Calibration, PackedWeight

SMALL = 256
"""Rows and columns of the matrix that is packed."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA (Touvron et al. 2023, arXiv 2302.13971, table 2)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int = 32_000

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers, hidden_size=self.hidden,
            intermediate_size=self.intermediate, num_attention_heads=self.heads,
            vocab_size=self.vocabulary, max_position_embeddings=2048, rms_norm_eps=1e-6,
            dtype="bfloat16", tie_word_embeddings=False,
        )  # fmt: skip


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(2, 128, 344, 4, 512),
    "1b": Shape(16, 2048, 5504, 16),
    "7b": Shape(32, 4096, 11008, 32),
    "13b": Shape(40, 5120, 13824, 40),
    "30b": Shape(60, 6656, 17920, 52),
    "65b": Shape(80, 8192, 22016, 64),
}


@dataclass
class RandomWeights:
    """Makes random packed weights of one quantizer."""

    quantizer: Quantizer
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    _samples: dict[int, PackedWeight] = field(default_factory=dict)

    def packed(self, shape: tuple[int, int]) -> PackedWeight:
        """A packed weight ``[out, in]`` on the CPU, of variance 1 / in."""
        layout = self.quantizer.layout(shape)
        sample = self._sample(shape[1])
        return layout.fill({name: self._drawn(sample.tensors[name], tensor.shape)
                            for name, tensor in layout.tensors.items()})  # fmt: skip

    def _sample(self, columns: int) -> PackedWeight:
        if columns not in self._samples:
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(SMALL, SMALL, generator=generator) / math.sqrt(columns)
            required = self.quantizer.spec.calibration == "required"
            calibration = Calibration(torch.eye(SMALL), 1) if required else None
            self._samples[columns] = self.quantizer.pack(weight, calibration)
        return self._samples[columns]

    def _drawn(self, sample: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        chosen = torch.randint(sample.numel(), (size,), generator=self.generator, dtype=torch.int32)
        return sample.flatten().index_select(0, chosen).view(shape)

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Ones for a norm, embeddings of variance 1, a head that makes logits of variance 1."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        deviation = 1.0 if "embed" in name else 1 / math.sqrt(shape[1])
        values = torch.empty(shape, dtype=torch.bfloat16)
        return values.normal_(0.0, deviation, generator=self.generator)


def write_checkpoint(
    model: str, quantizer: Quantizer, out: Path, *, progress: Progress | None = None
) -> None:
    """Write a packed checkpoint with a file for each parameter, unless it is there.

    Args:
        model: one of :data:`SHAPES`.
        quantizer: packs the linear layers.
        out: the folder; it appears when it is whole.
        progress: called after each file.

    Raises:
        DiskSpaceError: the disk has too little space.
    """
    if (out / "config.json").is_file():
        return
    config = SHAPES[model].config()
    skeleton = build_skeleton(config, torch.bfloat16)
    sites = {site.name: site for site in find_sites(skeleton).linears}
    record = _record(model, quantizer, sites)
    weights = RandomWeights(quantizer)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.named_parameters()}
    dense = sum(2 * math.prod(shape) for name, shape in shapes.items() if name not in sites)
    check_disk_space(out, record.nbytes + dense)
    with whole_or_nothing(out) as folder:
        index: dict[str, str] = {}
        for number, (name, shape) in enumerate(shapes.items(), 1):
            if name in sites:
                packed = weights.packed((shape[0], shape[1]))
                tensors = {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
            else:
                tensors = {name: weights.dense(name, shape)}
            file = f"model-{number:05d}-of-{len(shapes):05d}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, file)
            if progress is not None:
                progress("writing", number, len(shapes))
        entries: dict[str, Any] = {"metadata": {}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(entries))
        config.architectures = [type(skeleton).__name__]
        config.quantization_config = record.to_json()
        config.save_pretrained(folder)


def _record(
    model: str, quantizer: Quantizer, sites: Mapping[str, LinearSite]
) -> QuantizationRecord:
    shapes = list(dict.fromkeys((site.out_features, site.in_features) for site in sites.values()))
    return QuantizationRecord(
        source={"name": f"random weights of the shapes of LLaMA {model}"},
        recipes=(Recipe.of(quantizer),),
        sites=tuple(
            PackedSite(recipe=0, kind="linear", layout=quantizer.layout(shape)) for shape in shapes
        ),
        weights={
            name: shapes.index((site.out_features, site.in_features))
            for name, site in sites.items()
        },
    )
