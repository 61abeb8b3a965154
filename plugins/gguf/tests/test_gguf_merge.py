"""A model is merged with its adapter into one GGUF file: values, order of rows, and metadata."""

import pytest
from modulora_gguf import FORMATS
from modulora_gguf.file.merging import LlamaCppWriter
from modulora_gguf.file.model_header import read_header
from modulora_gguf.tests.adapted import adapted
from modulora_gguf.tests.tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

from modulora_core.cli import main as run
from modulora_core.errors import ModelError, OptionError, OutputError
from modulora_core.hf.load_model import load_model
from modulora_core.inference.opened import open_to_run
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.other_tools import assert_close, logits
from modulora_core.tests.tiny_models import tiny_config

write_merged = LlamaCppWriter(FORMATS[0]).merge


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "qwen3moe", "lfm2"])
def test_the_file_has_the_logits_of_the_adapter(architecture, tmp_path):
    """In F32 nothing is lost; rows of q and k, and gates and ups of experts, are put back."""
    path = write_tiny_gguf(architecture, tmp_path / "base.gguf", "Q8_0")
    model = adapted(path, tmp_path / "adapter", std=0.1)
    adapter, out = str(tmp_path / "adapter"), tmp_path / "merged.gguf"
    merged = write_merged(str(path), out, adapter=adapter, type="F32")
    assert_close(logits(open_to_run(str(out)).load()), logits(model))
    assert min(merged.retained.values()) == pytest.approx(1, abs=1e-5)
    base, written = read_header(path), read_header(out)
    assert {n: f.value for n, f in written.fields.items()} == {
        n: f.value for n, f in base.fields.items()
    }
    before, after = path.read_bytes(), out.read_bytes()
    for one, other in zip(base.tensors, written.tensors, strict=True):
        assert (one.name, one.shape) == (other.name, other.shape)
        if one.name not in merged.retained:
            stored = before[one.offset :][: one.nbytes]
            assert after[other.offset :][: other.nbytes] == stored, one.name


def test_a_folder_takes_metadata_from_a_file_of_the_same_model(tmp_path):
    """Everything is written anew, vectors too."""
    path = write_tiny_gguf("qwen3moe", tmp_path / "base.gguf", "Q8_0")
    packed, out = tmp_path / "packed", tmp_path / "merged.gguf"
    quantize(str(path), packed, "gguf", {"type": "Q4_0"})
    model = adapted(packed, tmp_path / "adapter", std=0.1)
    other = write_tiny_gguf("llama", tmp_path / "other.gguf", "Q8_0")
    with pytest.raises(ModelError, match=r"other\.gguf has no tensor of it"):
        write_merged(str(packed), out, base=str(other))
    assert not list(tmp_path.glob("*.partial"))
    adapter = str(tmp_path / "adapter")
    merged = write_merged(str(packed), out, adapter=adapter, base=str(path), type="F32")
    assert_close(logits(open_to_run(str(out)).load()), logits(model))
    assert merged.types == {"F32": len(read_header(path).tensors)}


def test_a_folder_without_a_file_of_its_model_asks_for_one(tmp_path):
    config = tiny_config("llama")
    config.intermediate_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    quantize(str(tmp_path / "source"), tmp_path / "packed", "gguf")
    with pytest.raises(
        OptionError, match=r"packed: expected a GGUF file .*, got none; .*--base FI"
    ):
        write_merged(str(tmp_path / "packed"), tmp_path / "merged.gguf")
    with pytest.raises(ModelError, match=r"expected a GGUF file of the same model, got a folder"):
        write_merged(
            str(tmp_path / "packed"), tmp_path / "merged.gguf", base=str(tmp_path / "source")
        )


def test_requantizing_to_the_grid_of_the_base_erases_a_small_update(tmp_path, caplog):
    path = write_tiny_gguf("llama", tmp_path / "base.gguf", "Q4_0")
    adapted(path, tmp_path / "adapter", std=2e-3)
    adapter = str(tmp_path / "adapter")
    lost = write_merged(str(path), tmp_path / "lost.gguf", adapter=adapter, type="Q4_0")
    assert lost.erased
    assert "erases more than half of the update" in caplog.text
    caplog.clear()
    kept = write_merged(str(path), tmp_path / "kept.gguf", adapter=adapter, type="F16")
    assert not kept.erased
    assert not caplog.text


def test_rows_that_a_type_cannot_hold_get_another_type(tmp_path):
    """As llama.cpp does: 256 divides no row here."""
    path = write_tiny_gguf("llama", tmp_path / "base.gguf", "Q8_0")
    adapted(path, tmp_path / "adapter")
    merged = write_merged(
        str(path), tmp_path / "merged.gguf", adapter=str(tmp_path / "adapter"), type="Q4_K"
    )
    assert merged.types == {"Q5_0": 14, "F32": 5, "Q8_0": 2}
    load_model(tmp_path / "merged.gguf")


def test_requests_are_refused_before_work(tmp_path):
    path = str(write_tiny_gguf("llama", tmp_path / "base.gguf", "Q8_0"))
    with pytest.raises(OptionError, match=r"type: expected one of Q4_0, .* got 'IQ2_S'"):
        write_merged(path, tmp_path / "out.gguf", type="IQ2_S")
    with pytest.raises(OutputError, match="expected a new file called"):
        write_merged(path, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.gguf"]


def test_the_command_names_the_next_one_which_compares_the_file_with_the_adapter(tmp_path, capsys):
    path = write_tiny_gguf("llama", tmp_path / "base.gguf", "Q8_0")
    adapted(path, tmp_path / "adapter", std=0.2)
    words = ["merge", str(path), "", "--adapter", str(tmp_path / "adapter"), "--json"]
    assert run([*words[:2], str(tmp_path / "folder"), *words[3:], "--type", "Q8_0"]) == 2
    assert "--type: expected OUT to be a file *.gguf" in capsys.readouterr().out
    words[2] = str(tmp_path / "merged.gguf")
    assert run([*words, "--dtype", "float32"]) == 2
    assert not (tmp_path / "merged.gguf").exists()
    assert run(words[:-1]) == 0
    shown = " ".join(capsys.readouterr().out.replace("\\\n", " ").split())
    assert f"modulora evaluate {path} --adapter {words[4]} --against {words[2]}" in shown
