"""Adapters with channel scales on disk: written, read, merged, refused, and left out by PEFT with a warning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from modulora_core.adapters.lora import (
    AdapterFolder,
    LoRASettings,
    adapter_layers,
    add_lora,
    load_adapter,
    save_adapter,
)
from modulora_core.adapters.merge import merge
from modulora_core.adapters.record import describe_base
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.cli import main
from modulora_core.errors import AdapterError, ShapeError
from modulora_core.packed import ChannelScales
from modulora_core.tests.adapted_models import logits, trained
from modulora_core.tests.fake_hub import serve_repository
from modulora_core.tiles import tile_budget

Pack = Callable[..., tuple[Path, Path]]

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "modulora.json",
    "modulora_scales.safetensors",
]
SCALED = LoRASettings(rank=3, train_scales=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(pack: Pack) -> nn.Module:
    """A tiny packed Llama with an adapter whose scales aren't one."""
    return trained(load_model(pack("llama", "toy")[1]), SCALED)


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    save_adapter(model, tmp_path / "adapter", base="org/base", settings=SCALED)
    return tmp_path / "adapter"


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "modulora.json").read_text())  # type: ignore[no-any-return]


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# written and read


def test_new_scales_train_and_change_no_logit(pack: Pack) -> None:
    model = load_model(pack("llama", "toy")[1])
    before = logits(model)
    paths = add_lora(model, SCALED)
    assert trains(model) == {
        f"{path}.{kind}.default"
        for path in paths
        for kind in ("lora_A", "lora_B", "input_scale", "output_scale")
    }
    assert torch.equal(logits(model), before)


def test_a_saved_adapter_comes_back_bit_for_bit(model: nn.Module, saved: Path, pack: Pack) -> None:
    assert sorted(path.name for path in saved.iterdir()) == FILES
    stored = load_file(saved / "modulora_scales.safetensors")
    assert set(stored) == {f"{path}.{kind}_scale" for path, _ in adapter_layers(model) for kind in ("input", "output")}  # fmt: skip
    for path, layer in adapter_layers(model):
        assert torch.equal(stored[f"{path}.input_scale"], layer.input_scale["default"])
        assert torch.equal(stored[f"{path}.output_scale"], layer.output_scale["default"])
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    again = load_model(pack("llama", "toy")[1])
    load_adapter(again, saved)
    assert torch.equal(logits(again), logits(model))
    assert trains(again) == set()


def test_a_loaded_adapter_goes_on_training_its_scales(saved: Path, pack: Pack) -> None:
    model = load_model(pack("llama", "toy")[1])
    paths = load_adapter(model, saved, trainable=True)
    assert len(trains(model)) == 4 * len(paths)
    assert {name.split(".")[-2] for name in trains(model)} == {"lora_A", "lora_B", "input_scale", "output_scale"}  # fmt: skip


def test_only_an_adapter_with_scales_has_format_2_and_a_key_of_its_own(saved: Path, pack: Pack, tmp_path: Path) -> None:  # fmt: skip
    assert (record(saved)["format"], record(saved)["channel_scales"]) == (2, True)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config.pop("modulora_channel_scales") == "modulora_scales.safetensors"
    plain = tmp_path / "plain"
    save_adapter(
        trained(load_model(pack("llama", "toy")[1]), LoRASettings(rank=3)), plain, base="org/base"
    )
    assert sorted(path.name for path in plain.iterdir()) == FILES[:3]
    assert record(plain)["format"] == 1
    assert "channel_scales" not in record(plain)
    assert json.loads((plain / "adapter_config.json").read_text()) == config


def test_an_adapter_without_scales_in_the_place_of_one_with_them_leaves_none(
    saved: Path, pack: Pack
) -> None:
    plain = trained(load_model(pack("llama", "toy")[1]), LoRASettings(rank=3))
    save_adapter(plain, saved, base="org/base")
    assert sorted(path.name for path in saved.iterdir()) == FILES[:3]
    assert not AdapterFolder(saved).has_channel_scales


def test_layers_without_scales_are_saved_with_ones(pack: Pack, tmp_path: Path) -> None:
    model = load_model(pack("llama", "toy")[1])
    add_lora(model, LoRASettings(rank=3))
    path, layer = next(adapter_layers(model))
    for values in (layer.lora_A, layer.lora_B, layer.scale):
        del values["default"]
    layer.active.clear()
    layer.add_adapter("default", 3, alpha=32, channel_scales=True)
    trained_scale = layer.input_scale["default"].data.fill_(2.0)
    save_adapter(model, tmp_path, base="org/base")
    saved = AdapterFolder(tmp_path)
    assert torch.equal(saved[path].channel_scales.input, trained_scale)
    assert all(torch.equal(delta.channel_scales.output, torch.ones(delta.shape[0])) for delta in saved.values())  # fmt: skip


def test_scales_are_no_part_of_the_bases_identity(model: nn.Module, pack: Pack) -> None:
    """They are one-dimensional as norms are, by which a base is known."""
    assert describe_base(model, "base") == describe_base(
        load_model(pack("llama", "toy")[1]), "base"
    )


def test_adapter_config_is_written_after_the_scales(model: nn.Module, tmp_path: Path) -> None:
    """A folder in the way of the scales stops the writing in the middle, as a full disk would."""
    (tmp_path / "modulora_scales.safetensors").mkdir()
    with pytest.raises(OSError, match="modulora_scales"):
        save_adapter(model, tmp_path, base="base")
    assert not (tmp_path / "adapter_config.json").exists()


def test_scales_that_are_no_vectors_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected two vectors, got \[3\] and \[2, 1\]"):
        ChannelScales(torch.ones(3), torch.ones(2, 1))


# merged, told, and read by PEFT


@pytest.mark.parametrize("architecture", ["llama-biased", "gpt2"])
def test_the_merged_model_gives_the_same_logits(
    pack: Pack, architecture: str, tmp_path: Path
) -> None:
    packed = pack(architecture, "toy")[1]
    model = trained(load_model(packed), SCALED)
    save_adapter(model, tmp_path / "adapter")
    with tile_budget(5 * 32 * 4):  # a few rows a tile: the rows of v must fit theirs
        merge(str(packed), tmp_path / "merged", adapter=str(tmp_path / "adapter"), dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_peft_warns_and_leaves_the_scales_out(pack: Pack, tmp_path: Path) -> None:
    dense, packed = pack("llama")
    model = trained(load_model(packed), SCALED)
    save_adapter(model, tmp_path, base=str(dense))
    with pytest.warns(UserWarning, match="modulora_channel_scales"):
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), tmp_path)
    ours = logits(model)
    assert (logits(theirs) - ours).abs().max() > 0.05
    for _, layer in adapter_layers(model):
        layer.input_scale.clear()
        layer.output_scale.clear()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_info_tells_of_the_scales_and_counts_them(
    model: nn.Module, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(saved), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["channel_scales"] is True
    layers = [layer for _, layer in adapter_layers(model)]
    assert told["parameters"] == sum(p.numel() for layer in layers for p in layer.parameters_of("default").values())  # fmt: skip


# damaged


def changed(**tensors: Tensor | None) -> Callable[[Path], None]:
    """Put tensors into the first q_proj's scales, or take them out."""

    def damage(folder: Path) -> None:
        file = folder / "modulora_scales.safetensors"
        stored = load_file(file)
        for name, tensor in tensors.items():
            stored.pop(f"model.layers.0.self_attn.q_proj.{name}", None)
            if tensor is not None:
                stored[f"model.layers.0.self_attn.q_proj.{name}"] = tensor
        save_file(stored, file)

    return damage


def edited(file: str, **values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / FILES[3]).unlink(), r"modulora_scales\.safetensors: expected the adapter's channel scales, got no"),
        (lambda f: (f / FILES[3]).write_bytes(b"short"), r"modulora_scales\.safetensors: expected the adapter's channel"),
        (changed(input_scale=None), r"q_proj\.input_scale: expected F32 \[32\], got none"),
        (changed(output_scale=torch.ones(31)), r"q_proj\.output_scale: expected F32 \[32\], got F32 \[31\]"),
        (changed(output_scale=torch.ones(32).half()), r"q_proj\.output_scale: expected F32 \[32\], got F16 \[32\]"),
        (changed(bias=torch.ones(32)), r"q_proj\.bias: expected none, got F32 \[32\]"),
        (lambda f: (f / "modulora.json").unlink(), "adapter_config.json says that it has channel scales, modulora.json doesn't"),
        (edited("modulora.json", format=1), "adapter_config.json says that it has channel scales, modulora.json doesn't"),
        (edited("modulora.json", channel_scales=None), "malformed modulora.json"),
        (edited(FILES[0], modulora_channel_scales=None),
         "modulora.json says that it has channel scales, adapter_config.json doesn't"),
    ],
    ids=["missing", "truncated", "no-vector", "shape", "dtype", "stranger", "no-record", "record", "malformed", "config"],
)  # fmt: skip
def test_a_damaged_adapter_is_refused_by_name_before_the_model_changes(
    pack: Pack, saved: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(saved)
    model = load_model(pack("llama", "toy")[1])
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, saved)
    assert not list(adapter_layers(model))


# from the Hub


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub on which every repository is the saved adapter, and an empty cache."""
    with serve_repository(saved) as url:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield


@pytest.mark.usefixtures("hub")
def test_an_adapter_from_the_hub_comes_with_its_scales(pack: Pack, model: nn.Module) -> None:
    again = load_model(pack("llama", "toy")[1])
    load_adapter(again, "org/adapter")
    assert torch.equal(logits(again), logits(model))
