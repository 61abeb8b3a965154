"""``pack-quantized`` folders of compressed-tensors are read to the last bit, and written."""

import json

import pytest
import torch
from modulora_conformance.tiny_model import tiny_model
from modulora_convert.convert import convert
from modulora_optq.options import Options
from modulora_optq.quantizer import OPTQ
from safetensors.torch import load_file, save_file

from modulora_core.checkpoints.opening import open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.tests.compressed_folders import load_dequantized, save_compressed
from modulora_core.tests.fuzzing import refused_or_runs
from modulora_core.tests.other_tools import assert_trains_as_converted, logits

pytest.importorskip("compressed_tensors")
# transformers says which of two configs it takes
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

FORMAT, DOWN = "pack-quantized", "model.layers.0.mlp.down_proj"
GROUPS = {"type": "int", "strategy": "group", "group_size": 32}
ROWS = {"type": "int", "strategy": "channel"}
KINDS = [
    {"num_bits": 4, "symmetric": True, **GROUPS}, {"num_bits": 4, "symmetric": False, **GROUPS},
    {"num_bits": 8, "symmetric": True, **ROWS}, {"num_bits": 8, "symmetric": False, **GROUPS},
    {"num_bits": 4, "symmetric": False, **ROWS},
]  # fmt: skip
kinds = pytest.mark.parametrize("weights", KINDS, ids=lambda w: "-".join(map(str, w.values())))


def stored_in(folder):
    return {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}


@kinds
def test_weights_are_those_of_transformers_and_come_back(weights, tmp_path):
    folder = tmp_path / "theirs"
    save_compressed(folder, FORMAT, torch.float16, **weights)
    checkpoint, theirs = open_packed(folder), load_dequantized(folder, torch.float16)
    for parameter in checkpoint.record.weights:
        (packed,) = checkpoint.packed(parameter)
        quantizer = checkpoint.quantizer(checkpoint.parameters[parameter])
        ours = quantizer.dequantize_tile(packed, (0, packed.shape[0]), torch.float16)
        assert torch.equal(ours, theirs.get_parameter(parameter)), parameter
    assert len(checkpoint.record.weights) == 14
    convert(str(folder), tmp_path / "ours", "modulora")
    convert(str(tmp_path / "ours"), tmp_path / "back", FORMAT)
    before, after = (stored_in(tmp_path / which) for which in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_columns_in_the_order_of_act_order_are_read(tmp_path):
    folder = tmp_path / "theirs"
    save_compressed(folder, FORMAT, torch.float16, **KINDS[1])
    whole = stored_in(folder)
    g_idx = torch.randperm(128, generator=torch.Generator().manual_seed(0)).int() // 32
    save_file(whole | {f"{DOWN}.weight_g_idx": g_idx}, folder / "model.safetensors")
    packed, scale, zeros = (
        whole[f"{DOWN}.weight_{part}"] for part in ("packed", "scale", "zero_point")
    )
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    q = (packed[..., None] >> shifts & 15).flatten(1)
    z = (zeros[:, None] >> shifts[:, None] & 15).flatten(0, 1)
    expected = ((q - z[:, g_idx]) * scale.float()[:, g_idx]).float()
    checkpoint = open_packed(folder)
    name = f"{DOWN}.weight"
    (found,) = checkpoint.packed(name)
    quantizer = checkpoint.quantizer(checkpoint.parameters[name])
    assert torch.equal(quantizer.dequantize_tile(found, (0, 64), torch.float32), expected)
    with pytest.raises(ModelError, match=r"down_proj: its columns are in the order of act_order"):
        convert(str(folder), tmp_path / "back", FORMAT)


def test_a_model_of_ours_is_read_by_transformers(tmp_path):
    packed = tiny_model(OPTQ(Options(group_size=16))).packed
    convert(str(packed), tmp_path / "theirs", FORMAT)
    expected = logits(load_model(packed, dtype="float32"))
    found = logits(load_dequantized(tmp_path / "theirs"))
    limit = 5e-3 * float(expected.abs().max())  # they multiply by scales in fp16
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.slow
def test_it_trains_as_its_copy_in_our_format(tmp_path):
    save_compressed(tmp_path / "theirs", FORMAT, torch.bfloat16, **KINDS[1])
    assert_trains_as_converted(tmp_path / "theirs", tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    save_compressed(tmp_path, FORMAT, torch.float16, **KINDS[1])
    whole = stored_in(tmp_path)
    packed, scale, zeros, shape = (
        f"{DOWN}.weight_{part}" for part in ("packed", "scale", "zero_point", "shape")
    )
    cases = {
        rf"{packed}: expected int32 words .* of \[64, 128\]": {packed: whole[packed][:, :9]},
        rf"{packed}: expected int32 words .* of \[-1, 128\]": {shape: torch.tensor([-1, 128])},
        rf"{shape}: expected int64 \[2\], got": {shape: torch.tensor([64])},
        rf"{scale}: expected floats \[64, groups\] of equal groups": {scale: whole[scale][:, :3]},
        rf"{zeros}: expected int32 \[8, 4\]": {zeros: whole[zeros][:3]},
        rf"{scale}: expected finite values": {scale: whole[scale] * torch.nan},
        rf"{scale}: expected scales that fp16 can hold": {scale: whole[scale].float() + 1e6},
        rf"{scale}: expected scales .*, got 1e-06": {scale: 0 * whole[scale].float() + 1e-6},
        rf"{DOWN}.weight_g_idx: expected 32 columns in each group": {
            f"{DOWN}.weight_g_idx": torch.zeros(128, dtype=torch.int32)
        },
    }
    for told, changed in cases.items():
        stored = {n: t.contiguous() for n, t in (whole | changed).items()}
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=told):
            load_model(tmp_path)
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["sparsity_config"] = {"format": "sparse-24-bitmask"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected dense weights, got 'sparse-24-bitmask'"):
        open_packed(tmp_path)


@pytest.mark.slow
def test_a_changed_folder_is_refused_or_runs(tmp_path):
    save_compressed(tmp_path, FORMAT, torch.float16, **KINDS[1])
    refused_or_runs(tmp_path)
