from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from modulora_core.adapters.merge import merge
from modulora_core.checkpoints.checkpoint import is_packed, load_model, open_checkpoint
from modulora_core.errors import CheckpointError, ModelError, OptionError
from modulora_core.inference.loading import open_to_run
from modulora_core.layers import QuantLinear
from modulora_core.models import formats, open_model
from modulora_core.tests.crude_folders import edit_config, save_crude

pytestmark = pytest.mark.usefixtures("toy")

IDS = torch.arange(3, 27).view(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("config_file", ["config.json", "crude.json", None])
def test_a_foreign_folder_loads_as_the_model_that_it_stands_for(
    files: int, config_file: str | None, tmp_path: Path
) -> None:
    dense = save_crude(tmp_path / "m", files=files, config_file=config_file)
    model = load_model(tmp_path / "m", dtype="float32", device="cpu")
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert packed == [name for name, _ in dense.named_modules() if name.endswith("proj")]
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


def test_a_conv1d_is_read_as_out_by_in(tmp_path: Path) -> None:
    dense = save_crude(tmp_path / "m", "gpt2", chosen=lambda name: ".c_" in name)
    model = load_model(tmp_path / "m", dtype="float32", device="cpu")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert {site.kind for _, site in checkpoint.record.items()} == {"conv1d"}
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


def test_an_output_head_that_is_quantized_there_is_packed_here(tmp_path: Path) -> None:
    dense = save_crude(
        tmp_path / "m", chosen=lambda name: name.endswith("proj") or name == "lm_head"
    )
    model = load_model(tmp_path / "m", dtype="float32", device="cpu")
    assert isinstance(model.lm_head, QuantLinear)
    assert "output head" not in open_checkpoint(tmp_path / "m").record.kept
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


def test_a_tied_model_with_a_quantized_head_is_untied(tmp_path: Path) -> None:
    dense = save_crude(
        tmp_path / "m", chosen=lambda name: name.endswith("proj") or name == "lm_head"
    )
    edit_config(tmp_path / "m", tie_word_embeddings=True)
    model = load_model(tmp_path / "m", dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


def test_what_is_dense_there_is_kept_with_a_reason(tmp_path: Path) -> None:
    save_crude(tmp_path / "m", chosen=lambda name: name.endswith("q_proj"))
    record = open_checkpoint(tmp_path / "m").record
    assert len(record.weights) == 2
    assert "model.layers.1.mlp.up_proj.weight" in record.kept["not quantized in m"]
    assert record.kept["output head"] == ["lm_head.weight"]
    assert record.source["name"] == "m"
    assert record.source["format"] == "crude"


def test_a_layer_is_read_when_it_is_asked_for_and_once(tmp_path: Path) -> None:
    save_crude(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = {
        name: tensor.clone() for name, tensor in load_file(file).items()
    }  # load_file maps the file
    checkpoint = open_checkpoint(tmp_path / "m")
    layer = "model.layers.0.mlp.up_proj"
    assert torch.equal(checkpoint.tensor(f"{layer}.weight.codes"), tensors[f"{layer}.turned"].t())
    file.write_bytes(b"")
    assert torch.equal(checkpoint.tensor(f"{layer}.weight.scale")[:, 0], tensors[f"{layer}.factor"])
    with pytest.raises(CheckpointError, match="the file was changed"):
        checkpoint.tensor("model.layers.1.mlp.up_proj.weight.codes")


def test_commands_find_it_packed(tmp_path: Path) -> None:
    dense = save_crude(tmp_path / "m")
    assert is_packed(tmp_path / "m")
    opened = open_to_run(str(tmp_path / "m"), dtype="float32", device="cpu")
    torch.testing.assert_close(logits(opened.load()), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config_file", ["config.json", None])
def test_merge_unpacks_it(config_file: str | None, tmp_path: Path) -> None:
    dense = save_crude(tmp_path / "m", config_file=config_file)
    merge(str(tmp_path / "m"), tmp_path / "out", dtype="float32")
    merged = open_to_run(str(tmp_path / "out"), dtype="float32", device="cpu").load()
    for name, value in dense.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("config_file", "told"),
    [
        ("config.json", r"crude \(config\.json"),
        ("crude.json", r"crude \(crude\.json"),
        (None, r"crude_3 \(config\.json"),
    ],
)
def test_quantizing_it_is_refused_with_what_to_do(
    config_file: str | None, told: str, tmp_path: Path
) -> None:
    save_crude(tmp_path / "m", config_file=config_file)
    with pytest.raises(
        ModelError,
        match=rf"already quantized with {told}\).*modulora convert .*/m OUT --to modulora",
    ):
        open_model(str(tmp_path / "m"))


def test_a_bias_that_the_model_has_no_place_for_must_be_zero(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.bias"
    save_crude(tmp_path / "zero", **{name: torch.zeros(48)})
    assert len(open_checkpoint(tmp_path / "zero").record.weights) == 14
    save_crude(tmp_path / "ones", **{name: torch.ones(48)})
    with pytest.raises(ModelError, match=f"{name}: the files have a bias that isn't zero"):
        open_checkpoint(tmp_path / "ones")


def test_a_layer_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.mlp.x_proj.turned": torch.ones(4, 4).char(),
        "model.layers.0.mlp.x_proj.factor": torch.ones(4),
    }
    save_crude(tmp_path / "m", **extra)
    with pytest.raises(
        ModelError,
        match=r"model\.layers\.0\.mlp\.x_proj is quantized there.*LlamaForCausalLM has no such layer",
    ):
        open_checkpoint(tmp_path / "m")


def test_experts_that_the_model_fuses_are_refused_by_name(tmp_path: Path) -> None:
    save_crude(tmp_path / "m", "qwen3_moe", chosen=lambda name: ".experts." in name)
    with pytest.raises(
        ModelError,
        match=r"experts\.0\.\w+_proj is quantized as a layer of its own.*part of \S*experts",
    ):
        open_checkpoint(tmp_path / "m")


def test_a_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_crude(tmp_path / "m")
    edit_config(tmp_path / "m", intermediate_size=40)
    with pytest.raises(
        CheckpointError, match=r"mlp\.\w+_proj\.weight: expected \[\d+, \d+\] by the config, got"
    ):
        open_checkpoint(tmp_path / "m")


def test_a_folder_with_no_quantized_layer_is_refused(tmp_path: Path) -> None:
    save_crude(tmp_path / "m", chosen=lambda name: False)
    with pytest.raises(CheckpointError, match="no tensor of its files is"):
        open_checkpoint(tmp_path / "m")


def test_a_format_that_nothing_installed_reads_is_named(tmp_path: Path) -> None:
    save_crude(tmp_path / "m")
    edit_config(tmp_path / "m", quantization_config={"quant_method": "exotic"})
    with pytest.raises(
        ModelError,
        match=r"quantized with exotic, which no installed plugin reads \(formats: .*crude",
    ):
        open_checkpoint(tmp_path / "m")


def test_what_the_format_refuses_is_told_as_it_says(tmp_path: Path) -> None:
    save_crude(tmp_path / "m")
    edit_config(tmp_path / "m", quantization_config={"quant_method": "crude", "levels": 200})
    with pytest.raises(ModelError, match="levels 200: not implemented"):
        open_checkpoint(tmp_path / "m")


# --- finding formats -------------------------------------------------------------------------------------


def test_an_installed_format_is_found_by_its_name(toy: ModuleType) -> None:
    assert {"crude", "crude_2"} <= set(formats.specs())
    assert formats.create("crude_2").spec.name == "crude_2"
    assert "crude.json" in formats.config_files()


def test_an_unknown_format_names_those_that_are_there() -> None:
    with pytest.raises(OptionError, match=r"format 'nonsense': expected one of modulora, .*crude"):
        formats.create("nonsense")


def test_a_broken_config_file_is_refused(tmp_path: Path) -> None:
    save_crude(tmp_path / "m", config_file="crude.json")
    (tmp_path / "m" / "crude.json").write_text("[1")
    with pytest.raises(ModelError, match=r"crude\.json: expected a JSON object"):
        is_packed(tmp_path / "m")


def test_a_config_file_of_another_method_says_nothing(tmp_path: Path) -> None:
    save_crude(tmp_path / "m", config_file="crude.json")
    (tmp_path / "m" / "crude.json").write_text('{"quant_method": "other"}')
    assert not is_packed(tmp_path / "m")


def test_a_key_of_config_json_without_a_value_says_nothing(tmp_path: Path) -> None:
    save_crude(tmp_path / "m", config_file=None)
    assert is_packed(tmp_path / "m")
    edit_config(tmp_path / "m", crude_levels=None)
    assert not is_packed(tmp_path / "m")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Theirs"), ("name", "a__b"), ("name", ""), ("location", "theirs"), ("config_files", ("config.json",)),
        ("config_files", ("../theirs.json",)), ("config_files", ("theirs.py",)), ("config_keys", ("",)), ("config_keys", (3,)),
        ("config_keys", ("quantization_config",)),
    ],
)  # fmt: skip
def test_a_malformed_field_of_a_format_is_refused_by_name(field: str, value: object) -> None:
    good = {
        "name": "theirs",
        "summary": "s",
        "location": "mine.theirs:Theirs",
        "config_files": ("theirs.json",),
    }
    assert formats.FormatSpec(**good).quant_methods == ()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"FormatSpec\n{field}"):
        formats.FormatSpec(**{**good, field: value})  # type: ignore[arg-type]
