"""Our checkpoints as GPTQ folders, and back."""

import json

import pytest
import torch
from modulora_convert.convert import convert
from modulora_optq.formats.gptq import GPTQ
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ, from_solution

from modulora_core.errors import ModelError, ShapeError
from modulora_core.models import installed_formats
from modulora_core.models.formats import StoredWeight
from modulora_core.tests.other_tools import assert_used
from modulora_core.tests.tiny_tokenizer import make_tokenizer

KINDS = [
    {"bits": 2, "symmetric": True},
    {"bits": 3},
    {"bits": 8, "permuted": True},
    {"group": -1},
    {"group": 24, "permuted": True},
    {"head": True},
    {"kept": ("q_proj",), "others": {"down_proj": (8, 32)},
     "dynamic": {"-:.*q_proj": {}, ".*down": {"bits": 8, "group_size": 32}}},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_v2_to_ours_to_v1_and_back_gives_the_tensors_that_the_formats_say(kind, gptq, tmp_path):
    gptq.save_gptq(tmp_path / "v2", version=2, **kind)
    gptq.save_gptq(tmp_path / "expected v1", version=1, **kind)
    convert(str(tmp_path / "v2"), tmp_path / "ours", "modulora")
    convert(str(tmp_path / "ours"), tmp_path / "v1", "gptq", max_shard_bytes=20_000)
    convert(str(tmp_path / "v1"), tmp_path / "back", "gptq_v2")
    for expected, written in (("expected v1", "v1"), ("v2", "back")):
        one, other = gptq.stored(tmp_path / expected), gptq.stored(tmp_path / written)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_config_says_what_holds_for_all_and_what_for_some(gptq, tmp_path):
    gptq.save_gptq(tmp_path / "v2", **KINDS[-1])
    convert(str(tmp_path / "v2"), tmp_path / "v1", "gptq")
    written = json.loads((tmp_path / "v1" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "v1" / "quantize_config.json").read_text()) == written
    expected = {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False,
        "lm_head": False, "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32",
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    assert written["dynamic"] == {
        r"-:^model\.layers\.0\.self_attn\.q_proj$": {},
        r"+:^model\.layers\.0\.mlp\.down_proj$": {
            "bits": 8,
            "group_size": 32,
            "sym": False,
            "desc_act": False,
        },
    }


def stored_weight(quantizer, packed, module="model.layers.0.mlp.up_proj"):
    return StoredWeight(module, quantizer, packed.layout, lambda part: packed.tensors[part])


def writer(name):
    return GPTQ(installed_formats.specs()[name])


def test_a_zero_of_0_is_refused_by_v1_and_kept_by_v2(random_solution):
    options = Options(bits=4, group_size=16)
    solution = random_solution((32, 64), options)
    assert bool((solution.zeros == 0).any())
    weight = stored_weight(OPTQ(options), from_solution(solution, options))
    with pytest.raises(ModelError, match=r"\d+ zero points are 0; gptq \(v1\).*--to gptq_v2"):
        writer("gptq").plan(weight)
    assert writer("gptq_v2").plan(weight).keys() == {"qweight", "qzeros", "scales", "g_idx"}


@pytest.mark.parametrize(("shape", "bits", "fits"), [
    ((32, 16), 2, True), ((32, 16), 3, False), ((32, 32), 3, True), ((24, 32), 4, True),
    ((20, 32), 4, False), ((36, 36), 8, True),
])  # fmt: skip
def test_a_shape_that_does_not_fill_words_is_refused(shape, bits, fits, random_solution):
    options = Options.model_validate({"bits": bits, "group_size": 16, "symmetric": True})
    weight = stored_weight(OPTQ(options), from_solution(random_solution(shape, options), options))
    if fits:
        planned = writer("gptq").plan(weight)
        made = writer("gptq").tensors(weight)
        assert {name: tuple(t.shape) for name, t in made.items()} == {
            n: t.shape for n, t in planned.items()
        }
    else:
        with pytest.raises(
            ShapeError, match=rf"shape \[{shape[0]}, {shape[1]}\] at {bits} bits: .*multiples of 32"
        ):
            writer("gptq").plan(weight)


def test_a_folder_is_converted_merged_finetuned_and_asked(gptq, tmp_path):
    gptq.save_gptq(tmp_path / "m", version=1, symmetric=True, permuted=True, vocab_size=640)
    make_tokenizer().save_pretrained(tmp_path / "m")
    assert_used(tmp_path / "m", tmp_path)
