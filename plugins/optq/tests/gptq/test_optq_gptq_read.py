"""GPTQ folders, written bit by bit, as our model."""

import pytest
import torch
from modulora_optq.quantizer import to_solution

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.layers import QuantLinear
from modulora_core.tests.fuzzing import refused_or_runs
from modulora_core.tests.other_tools import logits

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


def check(folder, dense, gptq):
    """Every layer is the dense one to the last bit, and the logits agree."""
    model = load_model(folder, dtype="float32", device="cpu")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight, rows = module.packed_weight, (0, module.out_features)
            W = weight.quantizer.dequantize_tile(weight.packed, rows, torch.float32)
            assert torch.equal(W, dense.get_submodule(name).weight), name
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "bits", "version"),
    [("symmetric", 2, 1), ("asymmetric", 3, 1), ("act-order", 4, 1), ("symmetric", 3, 2),
     ("asymmetric", 8, 2), ("act-order", 2, 2)],
)  # fmt: skip
def test_every_width_and_version_reads_to_the_last_bit(kind, bits, version, gptq, tmp_path):
    symmetric, permuted = kind == "symmetric", kind == "act-order"
    dense = gptq.save_gptq(
        tmp_path / "m", bits=bits, version=version, symmetric=symmetric, permuted=permuted
    )
    layouts = [site.layout for _, site in open_packed(tmp_path / "m").record.items()]
    assert {layout.metadata["symmetric"] for layout in layouts} == {symmetric}
    assert {layout.metadata["permuted"] for layout in layouts} == {permuted}
    assert all(("zeros" in layout.tensors) != symmetric for layout in layouts)
    check(tmp_path / "m", dense, gptq)


@pytest.mark.parametrize(
    "options",
    [
        {"group": -1}, {"group": 24, "permuted": True}, {"group": 1000}, {"g_idx": False},
        {"files": 3}, {"config_file": "quantize_config.json"}, {"head": True},
        {"kept": ("q_proj",)},
    ],
    ids=str,
)  # fmt: skip
def test_variants_of_folders_are_read(options, gptq, tmp_path):
    dense = gptq.save_gptq(tmp_path / "m", **options)
    check(tmp_path / "m", dense, gptq)
    packed = open_packed(tmp_path / "m").record.weights
    assert ("lm_head.weight" in packed) == ("head" in options)
    assert len(packed) == 7 + ("head" in options) - ("kept" in options)


def test_dynamic_overrides_by_the_first_pattern_that_matches(gptq, tmp_path):
    dynamic = {r"-:.*q_proj": {}, r"+:.*\.mlp\.down": {"bits": 8, "group_size": 32}, r".*proj": {}}
    dense = gptq.save_gptq(
        tmp_path / "m", others={"down_proj": (8, 32)}, kept=("q_proj",), dynamic=dynamic
    )
    check(tmp_path / "m", dense, gptq)
    record = open_packed(tmp_path / "m").record
    assert [
        record.recipes[site.recipe].options["bits"] for name, site in record.items() if DOWN in name
    ] == [8]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_of_0_that_borrowed_from_their_neighbours_are_read(bits, gptq, tmp_path):
    gptq.save_gptq(tmp_path / "m", bits=bits, version=1, meta={"quantizer": ["gptqmodel:7.6.0"]})
    z = torch.arange(32).remainder(2**bits).view(32, 1).repeat(1, 4)  # [out, groups], every value
    if bits == 3:
        qzeros = gptq.words(((z - 1) & 7).T.tolist(), bits).T
    else:
        ones = sum(1 << i for i in range(0, 32, bits))
        less_one = (gptq.words(z.T.tolist(), bits).T.long() - ones) & 0xFFFFFFFF
        qzeros = less_one.to(torch.uint32).view(torch.int32)
    gptq.change(tmp_path / "m", **{f"{DOWN}.qzeros": qzeros.contiguous()})
    (packed,) = open_packed(tmp_path / "m").packed(f"{DOWN}.weight")
    assert torch.equal(to_solution(packed).zeros.long(), z)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"bits": 5}, "'bits': expected 2, 3, 4 or 8, got 5; .* not implemented"),
        ({"checkpoint_format": None, "format": "marlin"}, "got 'marlin'"),
        ({"rotation": "hadamard"}, "rotation 'hadamard' is not implemented"),
        ({"dynamic": {"+:.*mlp": {"bits": 6}}}, r"dynamic '\+:\.\*mlp': option 'bits': .* got 6"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_implemented_is_refused_by_name(config, match, gptq, tmp_path):
    group = config.get("group_size", 16)
    gptq.save_gptq(
        tmp_path / "m",
        **{"group": group, **{k: v for k, v in config.items() if k not in ("group_size", "bits")}},
    )
    if "bits" in config:
        text = (
            (tmp_path / "m" / "config.json")
            .read_text()
            .replace('"bits": 4', f'"bits": {config["bits"]}')
        )
        (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(ModelError, match=match):
        open_packed(tmp_path / "m")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_of_0_in_v1_are_noticed(bits, gptq, tmp_path):
    gptq.save_gptq(tmp_path / "m", bits=bits, version=1)
    qzeros = gptq.stored(tmp_path / "m")[f"{DOWN}.qzeros"].clone()
    qzeros[0, 0] |= 2**bits - 1
    gptq.change(tmp_path / "m", **{f"{DOWN}.qzeros": qzeros})
    match = rf"{DOWN}\.qzeros: 1 of 128 zeros are stored as {2**bits - 1}.*were 0"
    with pytest.raises(CheckpointError, match=match):
        open_packed(tmp_path / "m")


def test_groups_of_uneven_sizes_are_refused(gptq, tmp_path):
    gptq.save_gptq(tmp_path / "m")
    g_idx = gptq.stored(tmp_path / "m")[f"{DOWN}.g_idx"].clone()
    g_idx[0] = 1
    gptq.change(tmp_path / "m", **{f"{DOWN}.g_idx": g_idx})
    with pytest.raises(
        CheckpointError, match=rf"{DOWN}\.g_idx: .*got 15 \(group 0\), 17 \(group 1\)"
    ):
        open_packed(tmp_path / "m")


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx", "qweight"])
def test_tensors_that_disagree_are_refused(part, gptq, tmp_path):
    gptq.save_gptq(tmp_path / "m")
    tensor = gptq.stored(tmp_path / "m")[f"{UP}.{part}"]
    gptq.change(tmp_path / "m", **{f"{UP}.{part}": tensor[:-1].clone()})
    with pytest.raises(CheckpointError, match=rf"{UP}\.\w+: expected"):
        open_packed(tmp_path / "m")


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(gptq, tmp_path):
    dynamic = {r"+:.*up_proj$": {"bits": 8}, r"-:^lm_head$": {}}
    gptq.save_gptq(tmp_path, permuted=True, others={"up_proj": (8, 16)}, dynamic=dynamic)
    refused_or_runs(tmp_path)
