"""A GGUF file is a packed checkpoint: its blocks stay as they are, and logits are transformers'."""

import pytest
import torch
from gguf import GGUFReader
from modulora_convert.convert import convert
from modulora_gguf import FORMATS, reference
from modulora_gguf.file.merging import LlamaCppWriter
from modulora_gguf.file.rows import places
from modulora_gguf.tests.adapted import adapted
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightConverter
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS, TiledToGroupedInputs

from modulora_core.checkpoints.opening import open_model, open_packed
from modulora_core.errors import CheckpointError, ModelError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.lora.settings import LoRASettings
from modulora_core.models import ModelSource, open_dense
from modulora_core.progress import quiet
from modulora_core.tests.other_tools import assert_close, load_with_transformers, logits

write_merged = LlamaCppWriter(FORMATS[0]).merge


MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def by_transformers(path):
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    return logits(model.eval())


def types_of(checkpoint):
    return {group["options"]["type"] for group in checkpoint.record.quantizers()}


@pytest.mark.parametrize(
    ("architecture", "kind", "packed"),
    [
        ("llama", "Q4_0", 16),  # the rows of q and k are permuted; embedding and head are two
        ("qwen2", "Q5_1", 15),
        ("gpt2", "Q8_0", 10),  # Conv1D
        ("bloom", "Q4_0", 9),  # q, k and v of each head are one after another in memory
        ("qwen3moe", "Q4_1", 14),  # experts in stacks, gate and up fused
        ("qwen3moe", {"": "Q8_0", "gate_exps": "Q4_0", "up_exps": "Q5_1"}, 14),
        ("lfm2", "Q8_0", 15),  # transformers reads it in its newer way
        ("qwen35moe", "Q8_0", 20),  # so too, with experts
    ],
)
def test_logits_are_those_of_transformers(architecture, kind, packed, tmp_path):
    path = write_tiny_gguf(architecture, tmp_path / "tiny.gguf", kind)
    checkpoint = open_packed(path)
    assert len(checkpoint.record.weights) == packed, sorted(checkpoint.record.weights)
    assert types_of(checkpoint) == ({kind} if isinstance(kind, str) else set(kind.values()))
    ours, theirs = logits(load_model(checkpoint)), by_transformers(path)
    assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(reference.DEQUANTIZE), len(MATRICES)))
def test_files_of_all_types_have_the_logits_of_transformers(first, tmp_path):
    """Rows of 256 weights; types that nothing here packs have random blocks."""
    kinds = dict(zip(MATRICES, [*reference.DEQUANTIZE][first:], strict=False))
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf", {"": "Q8_0", **kinds}, wide=True)
    checkpoint = open_packed(path)
    assert types_of(checkpoint) == {"Q8_0", *kinds.values()} - {"BF16"}  # floats stay dense
    theirs = by_transformers(path)
    bound = 1e-3 * float(theirs.abs().max())
    torch.testing.assert_close(logits(load_model(checkpoint)), theirs, rtol=1e-3, atol=bound)


@pytest.mark.slow
def test_the_scales_of_nvfp4_weights_are_applied(tmp_path):
    """Transformers leaves them out. Gates and ups of each expert have one each."""
    kinds = {"": "Q8_0", "attn_q": "NVFP4", "attn_v": "NVFP4", "exps": "NVFP4"}
    path = write_tiny_gguf("qwen3moe", tmp_path / "tiny.gguf", kinds, wide=True, scaled="NVFP4")
    scales = {t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(path).tensors
              if t.name.endswith(".scale")}  # fmt: skip
    assert len(scales) == 10
    with quiet():
        dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    for number, layer in enumerate(dense.model.layers):
        own = {name: scales[f"blk.{number}.{name}.scale"][:, None, None]
               for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")}  # fmt: skip
        layer.self_attn.q_proj.weight.data *= scales[f"blk.{number}.attn_q.scale"]
        layer.self_attn.v_proj.weight.data *= scales[f"blk.{number}.attn_v.scale"]
        gates, ups = layer.mlp.experts.gate_up_proj.data.chunk(2, dim=1)
        gates *= own["ffn_gate_exps"]
        ups *= own["ffn_up_exps"]
        layer.mlp.experts.down_proj.data *= own["ffn_down_exps"]
    wanted = logits(dense.eval())
    for name in ("self_attn.q_proj.weight", "mlp.experts.gate_up_proj"):  # to quantize it again
        name = f"model.layers.1.{name}"
        read = dict(open_dense(str(path)).tensors(names=[name]))[name]
        torch.testing.assert_close(read, dense.get_parameter(name).data)
    checkpoint = open_packed(path)
    assert types_of(checkpoint) == {"Q8_0", "NVFP4"}
    assert_close(logits(load_model(checkpoint)), wanted)
    model = adapted(path, tmp_path / "adapter", 0.02, LoRASettings(rank=4))
    merged = tmp_path / "merged.gguf"
    write_merged(str(path), merged, adapter=str(tmp_path / "adapter"), type="Q8_0", progress=False)
    ours, theirs = logits(load_model(merged)), logits(model)
    assert float((ours - theirs).norm() / (theirs - wanted).norm()) < 0.1


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_a_split_model_is_the_whole_one(architecture, tmp_path):
    """Transformers can't read the parts of a model."""
    whole = write_tiny_gguf(architecture, tmp_path / "whole.gguf", "Q8_0")
    first = str(write_tiny_gguf(architecture, tmp_path / "tiny.gguf", "Q8_0", split=9))
    assert torch.equal(logits(load_model(first)), logits(load_model(whole)))
    write_merged(first, tmp_path / "joined.gguf", progress=False)
    assert torch.equal(logits(load_model(tmp_path / "joined.gguf")), logits(load_model(whole)))


def test_a_weight_whose_columns_transformers_moves_stays_dense(tmp_path, monkeypatch):
    """As in the linear attention of Qwen 3.5."""
    moves = WeightConverter(
        source_patterns=r"self_attn\.out_proj\.weight",
        target_patterns="self_attn.out_proj.weight",
        operations=[TiledToGroupedInputs(2, 2, 8)],
    )
    lfm2 = GGUF_ARCHS["lfm2"]
    monkeypatch.setitem(GGUF_ARCHS, "lfm2", lambda config: [*lfm2(config), moves])
    path = write_tiny_gguf("lfm2", tmp_path / "tiny.gguf", "Q8_0")
    source, packed = open_dense(str(path)), open_packed(path).record.weights
    dense = next(name for name in source.parameters if name.endswith("self_attn.out_proj.weight"))
    assert dense not in packed
    assert dense.replace("out_proj", "q_proj") in packed
    with pytest.raises(
        ModelError, match=r"expected whole rows of .*, got values that transformers"
    ):
        places(source, dense)


def test_it_is_converted_and_merged(tmp_path):
    kinds = {"": "Q8_0", "up_exps": "Q5_1"}
    path = write_tiny_gguf("qwen3moe", tmp_path / "tiny.gguf", kinds)
    convert(str(path), tmp_path / "ours", "modulora")
    merge(str(path), tmp_path / "merged", dtype="float32")
    expected = logits(load_model(path))
    assert torch.equal(logits(load_model(tmp_path / "ours")), expected)
    dense = logits(load_with_transformers(tmp_path / "merged"))
    assert_close(dense, expected)


def test_files_without_packed_weights_are_dense_and_damage_is_refused(tmp_path, monkeypatch):
    path = write_tiny_gguf("llama", tmp_path / "dense.gguf", "F16")
    assert isinstance(open_model(path), ModelSource)
    with pytest.raises(ModelError, match="it isn't quantized"):
        open_packed(path)
    with monkeypatch.context() as without_plugin:
        without_plugin.setenv("MODULORA_BLOCK", "gguf")
        with pytest.raises(ModelError, match="got none; it is modulora-gguf, which is disabled"):
            open_packed(path)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a GGUF file, or truncated"):
        open_packed(broken)
