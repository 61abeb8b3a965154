"""Packed checkpoints of LLaMA's shapes with random weights, written straight to disk: no dense weight exists at any time.

A quantizer packs one small Gaussian matrix. Of each of its packed tensors (codes, scales, vectors) the entries of the large ones are
drawn, at random and with repetition. So the tensors of any quantizer are filled without knowing what they mean: codes are as frequent as
those of Gaussian weights, and scales are those of a weight whose products are as large as their inputs. Nothing of it says how good a
model is; all of it takes the time and the memory of one.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

import modulora_core
from modulora_core.checkpoints.outputs import check_disk_space, whole_or_nothing
from modulora_core.checkpoints.record import PackedSite, QuantizationRecord, Recipe
from modulora_core.checkpoints.shards import ShardWriter, plan_shards
from modulora_core.errors import CheckpointError
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.sites import Sites, find_sites
from modulora_core.registry import Choice
from modulora_core.spec import Calibration, PackedLayout, Quantizer, TensorLayout

STORED = "bfloat16"
"""The dtype of what isn't packed: embeddings, output head, norms."""

SMALL = 256
"""Rows and columns of the matrix that is packed."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a LLaMA (Touvron et al. 2023, arXiv 2302.13971, table 2, and the released configurations)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int = 32_000

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers, hidden_size=self.hidden, intermediate_size=self.intermediate, num_attention_heads=self.heads,
            vocab_size=self.vocabulary, max_position_embeddings=2048, rms_norm_eps=1e-6, dtype=STORED, tie_word_embeddings=False,
        )  # fmt: skip


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(2, 128, 344, 4, 512),
    "1b": Shape(16, 2048, 5504, 16),
    "7b": Shape(32, 4096, 11008, 32),
    "13b": Shape(40, 5120, 13824, 40),
    "30b": Shape(60, 6656, 17920, 52),
    "65b": Shape(80, 8192, 22016, 64),
}


def create_quantizer(words: str) -> Quantizer:
    """The quantizer of ``NAME`` or ``NAME:OPTION=VALUE,...``."""
    return Choice.parse(words).create()


def write_checkpoint(
    model: str, quantizer: Quantizer, out: Path, *, seed: int = 0, progress: Progress | None = None
) -> int:
    """Write the checkpoint, or what a killed run left out of it; does nothing where it is whole.

    Args:
        model: one of :data:`SHAPES`.
        quantizer: whose packed tensors are written.
        out: the folder.
        seed: of the random numbers. Each parameter has its own, so that a resumed run writes the same bytes.
        progress: gets the bytes written and all that there are.

    Returns:
        the bytes of all tensors.

    Raises:
        CheckpointError: ``out`` holds another request's checkpoint, whole or begun.
        DiskSpaceError: there is no room.
    """
    config = SHAPES[model].config()
    skeleton = build_skeleton(config, torch.bfloat16)
    sites = find_sites(skeleton)
    record = _record(model, quantizer, sites, seed)
    dense = {name: TensorLayout(STORED, tuple(p.shape)) for name, p in skeleton.named_parameters() if name in sites.kept}  # fmt: skip
    tensors = {name: {name: layout} for name, layout in dense.items()}
    tensors |= {name: dict(site.tensors(name)) for name, site in record.items()}
    ordered = {
        name: layout for parameter, _ in skeleton.named_parameters() for name, layout in tensors[parameter].items()
    }  # fmt: skip
    total = sum(layout.nbytes for layout in ordered.values())
    if (out / "config.json").is_file():
        _check_same(out, record)
        return total
    check_disk_space(out, total)
    filler = _Filler(quantizer)
    with whole_or_nothing(out, resume=True) as folder:
        writer = ShardWriter(folder, plan_shards(ordered), resume=True)
        written = 0
        for parameter, layouts in tensors.items():
            if parameter not in writer.done:
                generator = torch.Generator().manual_seed(zlib.crc32(parameter.encode(), seed))
                if parameter in dense:
                    writer.write(
                        parameter, {parameter: _dense(parameter, dense[parameter], generator)}
                    )
                else:
                    shape = record.sites[record.weights[parameter]].layout.shape
                    writer.write(parameter, filler.fill(layouts, shape, generator))
            written += sum(layout.nbytes for layout in layouts.values())
            if progress is not None:
                progress(written, total)
        config.architectures = [type(skeleton).__name__]
        config.quantization_config = record.to_json()
        config.save_pretrained(folder)
        writer.finish()
    return total


def _record(model: str, quantizer: Quantizer, sites: Sites, seed: int) -> QuantizationRecord:
    layouts: dict[tuple[int, int], PackedLayout] = {}
    for linear in sites.linears:
        shape = linear.out_features, linear.in_features
        if shape not in layouts:
            quantizer.check_shape(shape)
            layouts[shape] = quantizer.layout(shape)
    numbers = {shape: i for i, shape in enumerate(layouts)}
    weights = {
        linear.name: numbers[linear.out_features, linear.in_features] for linear in sites.linears
    }
    kept: dict[str, list[str]] = {}
    for name, reason in sites.kept.items():
        kept.setdefault(reason, []).append(name)
    source = {"name": f"random weights of the shapes of LLaMA {model}"}
    packed = tuple(PackedSite(recipe=0, kind="linear", layout=layout) for layout in layouts.values())
    recipes = (Recipe.of(quantizer),)
    return QuantizationRecord(
        core_version=modulora_core.__version__,
        seed=seed,
        source=source,
        recipes=recipes,
        sites=packed,
        weights=weights,
        kept=kept,
    )


def _check_same(out: Path, record: QuantizationRecord) -> None:
    written = json.loads((out / "config.json").read_text()).get("quantization_config", {})
    expected = json.loads(json.dumps(record.to_json()))
    for key in ("source", "recipes", "seed"):
        if written.get(key) != expected[key]:
            raise CheckpointError(
                f"{out}: expected a checkpoint whose {key} is {expected[key]}, got {written.get(key)}; remove it or name another folder"
            )


class _Filler:
    """Random packed tensors of one quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self._samples: dict[int, Mapping[str, Tensor]] = {}

    def fill(
        self,
        layouts: Mapping[str, TensorLayout],
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Tensors of ``layouts``, whose names end with those of the packed format, of a weight of ``shape``."""
        samples = self._samples_of(shape[1])
        return {
            name: _drawn(samples[name.rpartition(".")[2]], layout, generator)
            for name, layout in layouts.items()
        }

    def _samples_of(self, columns: int) -> Mapping[str, Tensor]:
        """The packed tensors of a small Gaussian matrix of variance 1 / columns, flat."""
        if columns not in self._samples:
            weight = torch.randn(
                SMALL, SMALL, generator=torch.Generator().manual_seed(0)
            ) / math.sqrt(columns)
            wanted = self._quantizer.spec.calibration == "required"
            packed = self._quantizer.pack(
                weight, Calibration(torch.eye(SMALL), 1) if wanted else None
            )
            self._samples[columns] = {
                name: tensor.reshape(-1) for name, tensor in packed.tensors.items()
            }
        return self._samples[columns]


def _drawn(sample: Tensor, layout: TensorLayout, generator: torch.Generator) -> Tensor:
    """Entries of ``sample``, at random: a tensor of ``layout``."""
    chosen = torch.randint(
        len(sample), (math.prod(layout.shape),), generator=generator, dtype=torch.int32
    )
    return sample.index_select(0, chosen).view(layout.shape)


def _dense(name: str, layout: TensorLayout, generator: torch.Generator) -> Tensor:
    """Ones for a norm, embeddings of variance 1, and a head that makes logits of variance 1 of them."""
    dtype: Any = getattr(torch, layout.dtype)
    if len(layout.shape) == 1:
        return torch.ones(layout.shape, dtype=dtype)
    deviation = 1.0 if "embed" in name else 1 / math.sqrt(layout.shape[1])
    return torch.empty(layout.shape, dtype=dtype).normal_(0.0, deviation, generator=generator)
