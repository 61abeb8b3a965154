from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.checkpoints.convert import convert
from modulora_core.cli import main
from modulora_core.errors import DiskSpaceError, ModelError, OptionError, OutputError, ShapeError
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.crude_folders import save_crude
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("toy")

IDS = torch.arange(3, 27).view(2, 12)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype="float32", device="cpu")(IDS).logits  # type: ignore[no-any-return]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_foreign_to_ours_keeps_every_weight(tmp_path: Path) -> None:
    save_crude(tmp_path / "theirs")
    result = convert(str(tmp_path / "theirs"), tmp_path / "ours", "modulora")
    checkpoint = open_checkpoint(tmp_path / "ours")
    assert checkpoint.foreign is None
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "theirs"))
    assert (result.format, result.source_format) == ("modulora", "crude")
    assert result.bytes == sum(t.nbytes for t in tensors(tmp_path / "ours").values())
    assert result.weights == sum(site.weights for _, site in checkpoint.record.items())


def test_there_and_back_gives_the_same_tensors_in_any_number_of_files(tmp_path: Path) -> None:
    save_crude(tmp_path / "theirs", chosen=lambda name: name.endswith("proj") or name == "lm_head")
    convert(str(tmp_path / "theirs"), tmp_path / "ours", "modulora", max_shard_bytes=10_000)
    convert(str(tmp_path / "ours"), tmp_path / "back", "crude", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert same(tensors(tmp_path / "back"), tensors(tmp_path / "theirs"))
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "ours"))


def test_a_format_that_is_only_read_is_converted_to_ours_and_refused_as_a_target(
    tmp_path: Path,
) -> None:
    save_crude(tmp_path / "theirs", config_file=None)
    convert(str(tmp_path / "theirs"), tmp_path / "ours", "modulora")
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "theirs"))
    assert "crude_levels" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    with pytest.raises(OptionError, match="format 'crude_3': it is only read, not written"):
        convert(str(tmp_path / "ours"), tmp_path / "back", "crude_3")
    assert not (tmp_path / "back").exists()


def test_ours_to_foreign_writes_its_config_where_it_looks(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "dense")
    quantize(
        str(tmp_path / "dense"), tmp_path / "ours", "toy", {"levels": 50}, exclude=["*.down_proj"]
    )
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "crude")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    written = config["quantization_config"]
    assert json.loads((tmp_path / "theirs" / "crude.json").read_text()) == written
    assert (written["levels"], written["version"]) == (50, "crude")
    assert "model.layers.0.mlp.down_proj" in written["kept"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(logits(tmp_path / "theirs"), logits(tmp_path / "ours"))


def test_one_foreign_format_becomes_another(tmp_path: Path) -> None:
    save_crude(tmp_path / "theirs")
    result = convert(str(tmp_path / "theirs"), tmp_path / "other", "crude_2")
    assert result.format == "crude_2"
    assert same(tensors(tmp_path / "other"), tensors(tmp_path / "theirs"))
    assert (
        json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"][
            "version"
        ]
        == "crude_2"
    )


def test_tokenizer_and_generation_config_go_along(tmp_path: Path) -> None:
    save_crude(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    (tmp_path / "theirs" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    convert(str(tmp_path / "theirs"), tmp_path / "ours", "modulora")
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    assert load_model(tmp_path / "theirs").generation_config.max_new_tokens == 7
    assert load_model(tmp_path / "ours").generation_config.max_new_tokens == 7


# --- refused before anything is written -----------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    save_crude(tmp_path / "theirs")
    return tmp_path / "theirs"


def packed(tmp_path: Path, architecture: str, quantizer: str) -> str:
    save_tiny_model(architecture, tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "ours", quantizer)
    return str(tmp_path / "ours")


def refused(source: str, tmp_path: Path, to: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        convert(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_unknown_format_is_refused(theirs: Path, tmp_path: Path) -> None:
    refused(
        str(theirs),
        tmp_path,
        "nonsense",
        OptionError,
        "format 'nonsense': expected one of modulora",
    )


def test_ours_to_ours_is_refused(tmp_path: Path) -> None:
    source = packed(tmp_path, "llama", "toy")
    refused(
        source,
        tmp_path,
        "modulora",
        OptionError,
        "in this format already; expected another, one of .*crude",
    )


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "dense")
    refused(str(tmp_path / "dense"), tmp_path, "crude", ModelError, "quantize it first")


def test_another_quantizers_weight_is_refused_by_name(tmp_path: Path) -> None:
    source = packed(tmp_path, "llama", "verbatim")
    refused(
        source, tmp_path, "crude", ModelError, r"model\.layers\.0\.\S+_proj: packed by verbatim"
    )


def test_a_shape_that_the_format_has_not_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 42,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "ours", "toy")
    match = r"model\.layers\.0\.mlp\.\w+_proj: out_features 42 is not a multiple of 4"
    refused(str(tmp_path / "ours"), tmp_path, "crude", ShapeError, match)


def test_fused_experts_are_refused_by_name(tmp_path: Path) -> None:
    source = packed(tmp_path, "qwen3_moe", "toy")
    refused(
        source,
        tmp_path,
        "crude",
        ModelError,
        r"experts\.\w+: a stack of 4 experts in one parameter",
    )


def test_an_output_that_holds_something_is_refused(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="expected it new or empty"):
        convert(str(theirs), tmp_path / "out", "modulora")


def test_a_full_disk_is_noticed_before_writing(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    refused(str(theirs), tmp_path, "modulora", DiskSpaceError, "1 MiB are free")


# --- the command line ------------------------------------------------------------------------------------


def test_the_command_tells_what_it_wrote(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert (
        main(
            ["convert", str(theirs), out, "--to", "modulora", "--max-shard-size", "20kB", "--json"]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["format"], told["source_format"]) == (out, "modulora", "crude")
    assert told.keys() >= {"bytes", "seconds", "peak_memory_bytes", "weights"}
    assert len(list(Path(out).glob("*.safetensors"))) > 1
    assert main(["info", str(theirs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "crude"


@pytest.mark.parametrize("size", ["0", "many"])
def test_a_shard_size_that_is_none_is_refused(
    size: str, theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(theirs), "out", "--to", "modulora", "--max-shard-size", size]
    assert main(words) == 2
    assert "--max-shard-size" in capsys.readouterr().err
