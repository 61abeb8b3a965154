"""L6: persistence.

A checkpoint is the packed tensors in safetensors and the layout in JSON. Whatever a quantizer needs beyond those two and its options is
lost between the machine that quantizes and the one that trains.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modulora_conformance import oracle
from modulora_conformance.another_process import Answer, answered
from modulora_conformance.bits import check_same_bytes, same_bits
from modulora_conformance.cases import inputs, packed
from modulora_conformance.changes import change_in_place, changed_weight
from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_conformance.other_options import other_options
from modulora_conformance.results import NOT_OFFERED
from modulora_conformance.tiny_model import (
    PACKED_LAYERS,
    dense_twin,
    logits_of,
    packed_layers,
    tiny_model,
)
from modulora_conformance.training_step import check_training_step
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.errors import CheckpointError, ModuLoRAError
from modulora_core.layers import PackedParameter, QuantLinear
from modulora_core.packed import PackedLayout
from modulora_core.spec import PackedWeight, Quantizer, titled

SHAPE = (32, 64)
REGISTERED = "test_the_spec_is_registered_by_an_entry_point"
RECORDED = "test_a_checkpoint_records_the_options"
ROUND_TRIP = "test_packed_tensors_and_layout_round_trip_bit_for_bit"
LEADING = "test_leading_dimensions_are_kept"
CHANGED = "test_a_changed_code_moves_forward_and_backward_alike"
READ_ELSEWHERE = "test_another_process_reads_the_same_weight"
MODEL = "test_a_transformer_is_quantized_saved_and_loaded"

MODEL_TOLERANCE = 1e-5
"""fp32 sums in another order through two blocks: some 100 ulps of the logits' norm."""


class Persistence(Level):
    level, title = "L6", "persistence"

    @needs("test_metadata_goes_through_json")
    def test_packed_tensors_and_layout_round_trip_bit_for_bit(
        self, quantizer: Quantizer, tmp_path: Path
    ) -> None:
        """If this fails: metadata isn't JSON (a tuple, a numpy number, a key that is no string), tensors share memory or have a dtype
        that safetensors doesn't keep, or the weight depends on something that is neither tensor nor metadata nor option.
        """
        weight = packed(quantizer, SHAPE)
        save_file(dict(weight.tensors), tmp_path / "packed.safetensors")
        layout = PackedLayout.from_json(json.loads(json.dumps(weight.layout.to_json())))
        assert layout == weight.layout, (
            f"layout: expected {weight.layout}, got {layout} after a round trip through JSON"
        )
        again = layout.fill(load_file(tmp_path / "packed.safetensors"))
        check_same_bytes(weight, again, "read from files")
        other = type(quantizer)(
            type(quantizer).Options.model_validate_json(quantizer.options.model_dump_json())
        )
        assert torch.equal(_tile(quantizer, weight), _tile(other, again)), (
            "expected the same Ŵ from the files in a new instance, got another"
        )

    @needs(REGISTERED, RECORDED, ROUND_TRIP)
    def test_another_process_reads_the_same_weight(self, quantizer: Quantizer) -> None:
        """If this fails: the weight depends on what this process knows: a table made while packing, a random number, the hash of a
        string.
        """
        expected = _tile(quantizer, packed(quantizer, SHAPE))
        found = _told_elsewhere(quantizer, lambda answer: same_bits(answer.tile, expected)).tile
        assert same_bits(found, expected), (
            f"expected the bits of this process's Ŵ in another one, got a difference of {float((found - expected).abs().max()):.3g}"
        )

    @needs(REGISTERED, ROUND_TRIP, "test_packing_is_deterministic", READ_ELSEWHERE)
    def test_another_process_packs_the_same_bytes(self, quantizer: Quantizer) -> None:
        """If this fails: the same weight gives other bytes in another process: by a random number, the process's id, the time, or the
        hash of a string, which Python draws for each. Draw from a torch.Generator with a seed of the options.
        """
        here = packed(quantizer, SHAPE)
        there = _told_elsewhere(quantizer, lambda answer: _same_packed(answer.packed, here)).packed
        check_same_bytes(here, there, "packed by another process")

    @needs(READ_ELSEWHERE, "test_another_process_packs_the_same_bytes")
    def test_options_keep_apart(self, quantizer: Quantizer) -> None:
        """If this fails: a weight is packed or read in another way after one with other options was, in the same process: a table or a
        buffer of the module is kept by fewer options than it is made from. A model may have layers of several.
        """
        others = other_options(quantizer)
        if not others:
            pytest.skip(f"{NOT_OFFERED}it has no options to be told apart")
        answer = answered(quantizer, SHAPE, others)
        what = (
            f"after weights with {len(others)} other sets of options, such as {titled(others[0])}"
        )
        expected = _tile(quantizer, packed(quantizer, SHAPE))
        assert same_bits(answer.tile, expected), f"{what}: expected the same bits of Ŵ, got others"
        check_same_bytes(packed(quantizer, SHAPE), answer.packed, f"packed {what}")

    def test_another_format_is_refused_or_migrated(self, quantizer: Quantizer) -> None:
        """If this fails: ``check_format`` lets a packed format pass that this version doesn't know, and its tensors are read as
        something else. Leave the one of the base class, or accept the numbers that you read.
        """
        weight = packed(quantizer, SHAPE)
        quantizer.check_format(weight)
        for other in (weight.format + 1000, 0, -1):
            foreign = PackedWeight(
                weight.quantizer, other, weight.shape, weight.tensors, weight.metadata
            )
            try:
                quantizer.check_format(foreign)
                quantizer.check_format(foreign.layout)
            except CheckpointError:
                continue
            same = torch.equal(_tile(quantizer, foreign), _tile(quantizer, weight))
            assert same, f"format {other}: expected CheckpointError or the same Ŵ, got another Ŵ"

    def test_moving_keeps_bytes_and_layout(self, quantizer: Quantizer) -> None:
        """If this fails: a packed tensor changes when it is copied, or the layout counts on the device."""
        weight = packed(quantizer, SHAPE)
        check_same_bytes(weight, weight.to("cpu"), "moved")
        meta = weight.to("meta")
        assert meta.layout == weight.layout, f"on meta: expected {weight.layout}, got {meta.layout}"
        assert weight.layout.empty().layout == weight.layout

    @pytest.mark.parametrize("assign", [True, False], ids=["into a skeleton", "in place"])
    @needs(ROUND_TRIP, CHANGED)
    def test_a_state_dict_brings_the_weight(self, quantizer: Quantizer, assign: bool) -> None:
        """If this fails: a layer goes on with the weight that it was made with after another one was loaded into it: something is
        kept by the layer, by the quantizer, or by the tensors' addresses.
        """
        weight, other = packed(quantizer, SHAPE, seed=1), packed(quantizer, SHAPE, seed=2)
        state = QuantLinear(PackedParameter(quantizer, weight), _bias(weight)).state_dict()
        start = weight.layout.empty("meta") if assign else other
        layer = QuantLinear(
            PackedParameter(quantizer, start), nn.Parameter(torch.zeros(weight.shape[0]))
        )
        x = inputs((3,), weight.shape[1], torch.float32)
        if not assign:
            layer(x)
        layer.load_state_dict(state, assign=assign)
        expected = QuantLinear(PackedParameter(quantizer, weight), _bias(weight))(x)
        assert torch.equal(layer(x), expected), (
            "expected the loaded weight's output bit for bit, got another"
        )
        check_same_bytes(weight, layer.weight.packed, "loaded")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_a_cast_of_the_model_keeps_packed_dtypes(
        self, quantizer: Quantizer, dtype: torch.dtype
    ) -> None:
        """If this fails: ``model.to(dtype)`` changes packed scales, or the product of the cast model isn't in its dtype."""
        weight = packed(quantizer, SHAPE)
        layer = QuantLinear(PackedParameter(quantizer, weight), _bias(weight)).to(dtype)
        check_same_bytes(weight, layer.weight.packed, f"in a model cast to {dtype}")
        y = layer(inputs((3,), weight.shape[1], dtype))
        assert y.dtype == dtype, f"expected a product in {dtype}, got {y.dtype}"

    @needs(ROUND_TRIP, CHANGED)
    def test_a_deep_copy_is_independent(self, quantizer: Quantizer) -> None:
        """If this fails: a copied model shares memory with the original, or something that was made from it: a change of one shows in
        the other.
        """
        weight = packed(quantizer, SHAPE)
        layer = QuantLinear(PackedParameter(quantizer, weight))
        x = inputs((3,), weight.shape[1], torch.float32)
        before = layer(x)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), before), "expected the copy's output bit for bit, got another"
        changed = changed_weight(quantizer, weight)
        change_in_place(twin.weight.packed, changed)
        assert torch.equal(layer(x), before), (
            "expected the original to stay as it was when its copy changed, got another output"
        )
        moved = QuantLinear(PackedParameter(twin.weight.quantizer, changed))(x)
        assert torch.equal(twin(x), moved), (
            "expected the copy to follow its own packed tensors, got another output"
        )

    @needs(REGISTERED, ROUND_TRIP, LEADING, "test_layout_foretells_the_packed_weight")
    def test_a_transformer_is_quantized_saved_and_loaded(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails though levels 1 to 5 pass: the pipeline meets what they don't: options from a checkpoint's record, layers of
        several shapes, packing from a memory-mapped file.
        """
        saved = tiny_model(quantizer)
        model = load_model(saved.packed, device="cpu")
        found = len(packed_layers(model))
        assert found == PACKED_LAYERS, f"expected {PACKED_LAYERS} packed layers, got {found}"
        logits = logits_of(model)
        error = oracle.relative_error(logits, logits_of(dense_twin(model, saved.dense)))
        measurements.at_most("logits against the dense model with Ŵ", error, MODEL_TOLERANCE)
        again = logits_of(load_model(saved.packed, device="cpu"))
        assert torch.equal(logits, again), (
            "expected the same logits bit for bit when loaded again, got others"
        )

    @needs(MODEL, "test_two_weights_in_one_graph_keep_apart")
    def test_a_transformer_trains_as_the_dense_one(
        self, quantizer: Quantizer, measurements: Measurements, tmp_path: Path
    ) -> None:
        """If this fails: gradients of adapters differ from those of the dense model with Ŵ + s B A, or an adapter that was saved and
        loaded on a model that was loaded anew gives other logits.
        """
        check_training_step(tiny_model(quantizer), tmp_path, measurements, MODEL_TOLERANCE)

    @needs(MODEL, "test_another_format_is_refused_or_migrated")
    def test_a_checkpoint_of_another_format_is_refused(
        self, quantizer: Quantizer, tmp_path: Path
    ) -> None:
        """If this fails: ``modulora`` loads a checkpoint whose packed format the plugin doesn't know. See ``check_format``."""
        saved = tiny_model(quantizer)
        folder = tmp_path / "packed"
        shutil.copytree(saved.packed, folder)
        config = json.loads((folder / "config.json").read_text())
        _raise_formats(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        try:
            model = load_model(folder, device="cpu")
        except ModuLoRAError:
            return
        same = torch.equal(logits_of(model), logits_of(load_model(saved.packed, device="cpu")))
        assert same, (
            "a checkpoint of format + 1000: expected it refused, or the same logits, got others"
        )

    @needs(MODEL)
    def test_nothing_is_unpickled(
        self, quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If this fails: a file of the checkpoint is a pickle, or loading unpickles something: opening a checkpoint from a stranger
        would run their code.
        """
        saved = tiny_model(quantizer)
        for file in saved.packed.iterdir():
            assert file.suffix == ".safetensors" or _is_text(file), (
                f"{file.name}: expected safetensors, JSON or text, got other bytes"
            )

        def refuse(*_: object, **__: object) -> NoReturn:
            pytest.fail(
                "expected a checkpoint to load without unpickling, got a call of pickle",
                pytrace=False,
            )

        for module, name in (
            (pickle, "load"),
            (pickle, "loads"),
            (pickle, "Unpickler"),
            (torch, "load"),
        ):
            monkeypatch.setattr(module, name, refuse)
        logits_of(load_model(saved.packed, device="cpu"))


def _told_elsewhere(quantizer: Quantizer, expected: Callable[[Answer], bool]) -> Answer:
    """What another process makes of the weight: one that used other options before, so that a process is started once for three
    checks; but where that one's answer isn't as expected, one that did nothing else.
    """
    with suppress(pytest.fail.Exception):
        found = answered(quantizer, SHAPE, other_options(quantizer))
        if expected(found):
            return found
    return answered(quantizer, SHAPE, [])


def _same_packed(one: PackedWeight, other: PackedWeight) -> bool:
    return one.layout == other.layout and all(
        same_bits(one.tensors[name], t) for name, t in other.tensors.items()
    )


def _tile(quantizer: Quantizer, weight: PackedWeight) -> Tensor:
    return quantizer.dequantize_tile(weight, (0, weight.shape[0]), torch.float32)


def _bias(weight: PackedWeight) -> nn.Parameter:
    return nn.Parameter(inputs((), weight.shape[0], torch.float32, 5))


def _raise_formats(record: object) -> None:
    """Add 1000 to the format of every layout in a checkpoint's record."""
    if isinstance(record, dict):
        if {"quantizer", "format", "tensors"} <= record.keys():
            record["format"] += 1000
        for value in record.values():
            _raise_formats(value)
    elif isinstance(record, list):
        for value in record:
            _raise_formats(value)


def _is_text(file: Path) -> bool:
    try:
        return "\0" not in file.read_text("utf-8")
    except UnicodeDecodeError:
        return False
