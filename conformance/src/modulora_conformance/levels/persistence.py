"""L6: packed weights survive files, other processes, and a whole tiny transformer."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from modulora_conformance.cases import packed, tile
from modulora_conformance.changes import check_same_bytes
from modulora_conformance.checks import Level, needs
from modulora_conformance.levels.gradients import APART
from modulora_conformance.levels.packing import LAYOUT
from modulora_conformance.levels.products import LEADING
from modulora_conformance.levels.state import NEW
from modulora_conformance.oracle import relative_error
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
from modulora_core.errors import CheckpointError
from modulora_core.packed import PackedLayout

SHAPE = (32, 64)
REGISTERED = "test_the_spec_is_registered_by_an_entry_point"
ROUND_TRIP = "test_packed_tensors_and_layout_round_trip_bit_for_bit"
READS = "test_another_process_reads_the_same_weight"
PACKS = "test_another_process_packs_the_same_bytes"
MODEL = "test_a_transformer_is_quantized_saved_and_loaded"


class Persistence(Level):
    """Packed weights survive files, other processes, and a whole tiny transformer.

    A checkpoint is the packed tensors in safetensors and the layout in JSON. Between the machine
    that quantizes and the machine that trains, anything else is lost except the options."""

    level, title = "L6", "persistence"

    @needs("test_metadata_goes_through_json", NEW)
    def test_packed_tensors_and_layout_round_trip_bit_for_bit(self, quantizer, tmp_path):
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

    def test_another_format_is_refused_or_migrated(self, quantizer):
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

    @needs(REGISTERED, ROUND_TRIP, LEADING, LAYOUT)
    def test_a_transformer_is_quantized_saved_and_loaded(self, quantizer, measurements):
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
    def test_a_transformer_trains_as_the_dense_one(self, quantizer, measurements, tmp_path):
        """If this fails: gradients of adapters differ from the dense model's with Ŵ + s B A.

        Or a saved adapter gives other logits after it is loaded.
        """
        check_training_step(tiny_model(quantizer), tmp_path, measurements)

    @needs(MODEL)
    def test_nothing_is_unpickled(self, quantizer, monkeypatch):
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


def _is_text(file: Path) -> bool:
    try:
        return "\0" not in file.read_text("utf-8")
    except UnicodeDecodeError:
        return False
