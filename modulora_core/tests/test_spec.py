"""The contract: specs, packed weights as values, and the defaults of Quantizer."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError

from modulora_core.errors import CheckpointError, OptionError, PluginError, ShapeError
from modulora_core.spec import (
    PackedLayout,
    PackedWeight,
    QuantizerSpec,
    check_rows,
)

GOOD = {
    "name": "mine",
    "summary": "s",
    "location": "mine.quantizer:Mine",
    "protocol": 2,
    "bits": (3,),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Mine"), ("name", "a--b"), ("name", "-a"), ("name", ""), ("name", "a_b"),
        ("location", "mine.quantizer"), ("location", "mine quantizer:Mine"), ("location", ":Mine"),
        ("bits", ()), ("bits", (0,)), ("bits", (64,)), ("bits", ("4",)), ("bits", 4), ("bits", [4]),
        ("calibration", "maybe"), ("protocol", 0), ("protocol", "1"), ("in_multiple", 0),
        ("out_multiple", -8), ("rescales", "yes"), ("rescales", None), ("devices", "cuda"),
        ("devices", ()), ("devices", (0,)), ("promises", None),
    ],
)  # fmt: skip
def test_a_malformed_field_is_refused_by_name(field, value):
    with pytest.raises(ValidationError) as refused:
        QuantizerSpec(**{**GOOD, field: value})
    assert {error["loc"][0] for error in refused.value.errors()} == {field}


def packed():
    tensors = {
        "codes": torch.arange(12, dtype=torch.uint8).reshape(4, 3),
        "scale": torch.ones(4, dtype=torch.float16),
    }
    return PackedWeight("mine", 2, (4, 6), tensors, {"group": 6})


def test_a_quantizer_that_needs_a_text_refuses_to_go_without_one():
    spec = QuantizerSpec(**GOOD, calibration="required")
    spec.check_text("notes.txt")
    with pytest.raises(OptionError, match="mine: expected a calibration text, got none"):
        spec.check_text(None)
    QuantizerSpec(**GOOD, calibration="optional").check_text(None)


def test_bits_per_weight_counts_every_byte():
    assert packed().nbytes == 12 + 8
    assert packed().bits_per_weight == 8 * 20 / 24
    assert packed().layout.nbytes == packed().nbytes
    assert packed().layout.bits_per_weight == packed().bits_per_weight


def test_layout_survives_json_and_fills_again():
    weight = packed()
    layout = PackedLayout.from_json(json.loads(json.dumps(weight.layout.to_json())))
    assert layout == weight.layout
    again = layout.fill(weight.tensors)
    assert all(torch.equal(again.tensors[n], weight.tensors[n]) for n in weight.tensors)
    assert layout.empty().device.type == "meta"


def test_fill_refuses_other_shapes_and_dtypes():
    layout = packed().layout
    for wrong in (torch.ones(5, dtype=torch.float16), torch.ones(4)):
        with pytest.raises(CheckpointError, match="expected"):
            layout.fill({**packed().tensors, "scale": wrong})
    with pytest.raises(CheckpointError, match="expected"):
        layout.fill({"codes": packed().tensors["codes"]})


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [4]},
        {"shape": None},
        {"tensors": {"codes": ["float3", [1]]}},
        {"tensors": [1]},
        {"format": "x"},
        {"tensors": {"c": ["int8", [-1]]}},
    ],
)
def test_a_malformed_layout_is_refused(change):
    with pytest.raises(CheckpointError):
        PackedLayout.from_json({**packed().layout.to_json(), **change})
    with pytest.raises(CheckpointError, match="expected quantizer, format"):
        PackedLayout.from_json({})


def test_a_packed_weight_is_frozen_and_copies_deeply():
    weight = packed()
    with pytest.raises(TypeError):
        weight.tensors["codes"] = torch.ones(1)
    with pytest.raises(TypeError):
        weight.metadata["group"] = 1
    twin = copy.deepcopy(weight)
    twin.tensors["codes"].zero_()
    assert weight.tensors["codes"].any()


@pytest.mark.parametrize("name", ["Codes", "a.b", "", "1a"])
def test_a_tensor_name_that_cannot_be_stored_is_refused(name):
    with pytest.raises(CheckpointError, match="packed tensor"):
        PackedWeight("mine", 1, (2, 3), {name: torch.ones(2)})


@pytest.mark.parametrize("rows", [(-1, 2), (3, 2), (0, 5), (5, 5)])
def test_rows_outside_of_the_weight_are_refused(rows):
    with pytest.raises(ShapeError, match="rows of a"):
        check_rows(packed(), rows)
    check_rows(packed(), (4, 4))


def test_the_base_class_refuses_shapes_by_the_specs_multiples(toy):
    class Eights(toy.Toy):
        spec = QuantizerSpec(**GOOD, out_multiple=2, in_multiple=8)

    Eights().check_shape((4, 16))
    with pytest.raises(ShapeError, match="mine: in_features 12 is not a positive multiple of 8"):
        Eights().check_shape((4, 12))
    with pytest.raises(ShapeError, match="out_features 3 is not a positive multiple of 2"):
        Eights().check_shape((3, 16))


def test_the_base_class_has_no_place_for_scales(toy):
    assert not toy.Toy.spec.rescales
    weight = toy.Toy().pack(torch.randn(6, 4))
    with pytest.raises(
        PluginError,
        match=r"toy: expected rescales=True, got a quantizer without",
    ):
        toy.Toy().rescaled(weight, torch.ones(4), torch.ones(6))
