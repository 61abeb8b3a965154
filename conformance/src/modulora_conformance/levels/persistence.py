"""L6: packed weights survive files, other processes, copies, and a whole tiny transformer."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modulora_conformance.cases import inputs, packed, tile
from modulora_conformance.changes import (
    change_in_place,
    changed_weight,
    check_same_bytes,
)
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.gradients import APART, CHANGED
from modulora_conformance.levels.packing import LAYOUT
from modulora_conformance.levels.products import LEADING
from modulora_conformance.levels.state import NEW
from modulora_conformance.oracle import relative_error
from modulora_conformance.results import Measurements
from modulora_conformance.tiny_model import (
    PACKED_LAYERS,
    TOLERANCE,
    check_training_step,
    dense_twin,
    load_model,
    logits_of,
    packed_layers,
    tiny_model,
)
from modulora_core.errors import CheckpointError, ModuLoRAError
from modulora_core.layers import QuantLinear
from modulora_core.packed import PackedLayout
from modulora_core.packed_parameters import PackedParameter
from modulora_core.spec import PackedWeight, Quantizer

SHAPE = (32, 64)
REGISTERED = "test_the_spec_is_registered_by_an_entry_point"
ROUND_TRIP = "test_packed_tensors_and_layout_round_trip_bit_for_bit"
READS = "test_another_process_reads_the_same_weight"
PACKS = "test_another_process_packs_the_same_bytes"
FORMAT = "test_another_format_is_refused_or_migrated"
MODEL = "test_a_transformer_is_quantized_saved_and_loaded"


class Persistence(Level):
    """Packed weights survive files, other processes, copies, and a whole tiny transformer.

    A checkpoint is the packed tensors in safetensors and the layout in JSON. Between the machine
    that quantizes and the machine that trains, anything else is lost except the options."""

    level, title = "L6", "persistence"

    @needs("test_metadata_goes_through_json", NEW)
    def test_packed_tensors_and_layout_round_trip_bit_for_bit(
        self, quantizer: Quantizer, tmp_path: Path
    ) -> None:
        """If this fails: metadata is not JSON (a tuple, a numpy number, a key that is no string).

        Or tensors share memory, or have a dtype that safetensors lacks. Or Ŵ depends on more than
        tensors, metadata and options.
        """
        weight = packed(quantizer, SHAPE)
        save_file(dict(weight.tensors), tmp_path / "packed.safetensors")
        layout = PackedLayout.from_json(json.loads(json.dumps(weight.layout.to_json())))
        again = layout.fill(load_file(tmp_path / "packed.safetensors"))
        check_same_bytes(weight, again, "read from files")
        options = type(quantizer).Options.model_validate_json(quantizer.options.model_dump_json())
        assert torch.equal(tile(quantizer, weight), tile(type(quantizer)(options), again)), (
            "expected the same Ŵ from the files in a new instance, got another"
        )

    def test_another_format_is_refused_or_migrated(self, quantizer: Quantizer) -> None:
        """If this fails: ``check_format`` accepts a format that this version misreads.

        Inherit it, or accept only the numbers that the other methods read.
        """
        weight = packed(quantizer, SHAPE)
        quantizer.check_format(weight)
        for other in (weight.format + 1000, 0, -1):
            layout = replace(weight.layout, format=other)
            foreign = layout.fill(weight.tensors)
            try:
                quantizer.check_format(foreign)
                quantizer.check_format(layout)
            except CheckpointError:
                continue
            assert torch.equal(tile(quantizer, foreign), tile(quantizer, weight)), (
                f"format {other}: expected CheckpointError or the same Ŵ, got another Ŵ"
            )

    def test_moving_keeps_bytes_and_layout(self, quantizer: Quantizer) -> None:
        """If this fails: copying changes a packed tensor, or the layout depends on the device."""
        weight = packed(quantizer, SHAPE)
        check_same_bytes(weight, weight.to("cpu"), "moved")
        for found in (weight.to("meta"), weight.layout.empty()):
            assert found.layout == weight.layout, weight.layout.differences(found.layout)

    @pytest.mark.parametrize("assign", [True, False], ids=["into a skeleton", "in place"])
    @needs(ROUND_TRIP, CHANGED)
    def test_a_state_dict_brings_the_weight(self, quantizer: Quantizer, assign: bool) -> None:
        """If this fails: after loading another weight, a layer still uses the old one.

        The layer, the quantizer or the tensors' addresses are the key of a cache.
        """
        weight, other = (packed(quantizer, SHAPE, seed) for seed in (1, 2))
        source, target = _layer(quantizer, weight), _layer(quantizer, other)
        x = inputs((3,), weight.shape[1], torch.float32)
        if assign:
            target = _layer(quantizer, weight.layout.empty("meta"))
        else:
            target(x)  # fills the caches
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(target(x), source(x)), (
            "expected the loaded weight's output bit for bit, got another"
        )
        check_same_bytes(weight, target.weight.packed, "loaded")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_a_cast_of_the_model_keeps_packed_dtypes(
        self, quantizer: Quantizer, dtype: torch.dtype
    ) -> None:
        """If this fails: ``model.to(dtype)`` changes packed scales, or products keep another
        dtype."""
        weight = packed(quantizer, SHAPE)
        layer = _layer(quantizer, weight).to(dtype)
        check_same_bytes(weight, layer.weight.packed, f"in a model cast to {dtype}")
        y = layer(inputs((3,), weight.shape[1], dtype))
        assert y.dtype == dtype, f"expected a product in {dtype}, got {y.dtype}"

    @needs(ROUND_TRIP, CHANGED)
    def test_a_deep_copy_is_independent(self, quantizer: Quantizer) -> None:
        """If this fails: a copied model shares memory or a cache with the original."""
        weight = packed(quantizer, SHAPE)
        layer, x = _layer(quantizer, weight), inputs((3,), weight.shape[1], torch.float32)
        before, twin = layer(x), copy.deepcopy(layer)
        assert torch.equal(twin(x), before), "expected the copy's output bit for bit, got another"
        changed = changed_weight(quantizer, weight)
        change_in_place(twin.weight.packed, changed)
        assert torch.equal(layer(x), before), (
            "expected the original unchanged after a change of its copy, got another output"
        )
        assert torch.equal(twin(x), _layer(quantizer, changed)(x)), (
            "expected the copy to use its own packed tensors, got another output"
        )

    @needs(REGISTERED, ROUND_TRIP, LEADING, LAYOUT)
    def test_a_transformer_is_quantized_saved_and_loaded(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails, though levels 1 to 5 pass: the pipeline meets cases that they lack.

        Options come from a checkpoint's record, layers have several shapes, and weights are packed
        from a memory-mapped file.
        """
        saved = tiny_model(quantizer)
        model = load_model(saved.packed)
        found = len(packed_layers(model))
        assert found == PACKED_LAYERS, f"expected {PACKED_LAYERS} packed layers, got {found}"
        logits = logits_of(model)
        error = relative_error(logits, logits_of(dense_twin(model, saved.dense)))
        measurements.at_most("logits against the dense model with Ŵ", error, TOLERANCE)
        again = logits_of(load_model(saved.packed))
        assert torch.equal(logits, again), (
            "expected the same logits bit for bit when loaded again, got others"
        )

    @needs(MODEL, APART)
    def test_a_transformer_trains_as_the_dense_one(
        self, quantizer: Quantizer, measurements: Measurements, tmp_path: Path
    ) -> None:
        """If this fails: gradients of adapters differ from the dense model's with Ŵ + s B A.

        Or a saved adapter gives other logits after it is loaded.
        """
        check_training_step(tiny_model(quantizer), tmp_path, measurements)

    @needs(MODEL, FORMAT)
    def test_a_checkpoint_of_another_format_is_refused(
        self, quantizer: Quantizer, tmp_path: Path
    ) -> None:
        """If this fails: ``modulora`` loads a checkpoint of an unknown format. See
        ``check_format``."""
        saved, folder = tiny_model(quantizer), tmp_path / "packed"
        shutil.copytree(saved.packed, folder)
        config = json.loads((folder / "config.json").read_text())
        _raise_formats(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        try:
            model = load_model(folder)
        except ModuLoRAError:
            return
        same = torch.equal(logits_of(model), logits_of(load_model(saved.packed)))
        assert same, "format + 1000: expected an error, or the same logits, got others"

    @needs(MODEL)
    def test_nothing_is_unpickled(
        self, quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If this fails: loading unpickles something, so that a stranger's checkpoint runs code."""
        saved = tiny_model(quantizer)
        for file in saved.packed.iterdir():
            assert file.suffix == ".safetensors" or _is_text(file), (
                f"{file.name}: expected safetensors, JSON or text, got other bytes"
            )

        def refuse(*_: object, **__: object) -> NoReturn:
            pytest.fail("expected loading without pickle, got a call of it", pytrace=False)

        monkeypatch.setattr(torch, "load", refuse)
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        logits_of(load_model(saved.packed))


def _layer(quantizer: Quantizer, weight: PackedWeight) -> QuantLinear:
    bias = nn.Parameter(inputs((), weight.shape[0], torch.float32, 5))
    return QuantLinear(PackedParameter(quantizer, weight), bias)


def _raise_formats(record: Any) -> None:
    """Add 1000 to the format of every layout in a checkpoint's record."""
    if isinstance(record, dict):
        if {"quantizer", "format", "tensors"} <= record.keys():
            record["format"] += 1000
        record = list(record.values())
    if isinstance(record, list):
        for value in record:
            _raise_formats(value)


def _is_text(file: Path) -> bool:
    try:
        return "\0" not in file.read_text("utf-8")
    except UnicodeDecodeError:
        return False
