"""Adapters on packed models: made, saved, loaded, refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from modulora_core.adapters.lora import (
    LoRASettings,
    adapter_deltas,
    adapter_layers,
    add_lora,
    load_adapter,
    save_adapter,
)
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.errors import AdapterError, ModelError, OptionError
from modulora_core.layers import QuantLinear
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import IDS, logits, randomize, trained

Pack = Callable[..., tuple[Path, Path]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama(pack: Pack) -> nn.Module:
    return load_model(pack("llama")[1])


# making


def test_every_packed_layer_gets_an_adapter_and_nothing_else_trains(llama: nn.Module) -> None:
    packed = [path for path, module in llama.named_modules() if isinstance(module, QuantLinear)]
    before = logits(llama)
    assert add_lora(llama, LoRASettings()) == packed
    assert len(packed) == 2 * 7
    trains = {name for name, parameter in llama.named_parameters() if parameter.requires_grad}
    assert trains == {f"{path}.lora_{factor}.default" for path in packed for factor in "AB"}
    assert torch.equal(logits(llama), before), (
        "B is zero at first, so the model computes what it did"
    )


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_global_random_numbers_alone(
    pack: Pack,
) -> None:
    def values(seed: int) -> list[Tensor]:
        model = load_model(pack("llama")[1])
        add_lora(model, LoRASettings(seed=seed))
        return [layer.lora_A["default"].data for _, layer in adapter_layers(model)]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = values(1), values(1), values(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (
            ("self_attn.k_proj",),
            ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"],
        ),
        (("model.layers.1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
    ],
)
def test_targets_match_whole_parts_at_the_end_of_a_path(
    llama: nn.Module, targets: tuple[str, ...], expected: list[str]
) -> None:
    assert add_lora(llama, LoRASettings(targets=targets)) == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_porj", "target 'q_porj': no packed layer of that name; did you mean 'q_proj'"),
        ("proj", "target 'proj': no packed layer of that name"),
        ("lm_head", "target 'lm_head': lm_head is no packed linear layer"),
    ],
)
def test_an_unknown_target_is_refused_before_anything_changes(
    llama: nn.Module, target: str, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        add_lora(llama, LoRASettings(targets=("v_proj", target)))
    assert not list(adapter_layers(llama))


def test_a_dense_model_is_refused_with_the_command_to_run(pack: Pack) -> None:
    dense = AutoModelForCausalLM.from_pretrained(pack("llama")[0])
    with pytest.raises(ModelError, match="run `modulora quantize` on it first"):
        add_lora(dense, LoRASettings())


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("dropout", 1.0), ("dropout", -0.1), ("alpha", 0.0), ("targets", ())],
)
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{name}: expected"):
        replace(LoRASettings(), **{name: value})


def test_an_adapter_follows_its_model_into_training_and_evaluation(llama: nn.Module) -> None:
    trained(llama, LoRASettings(rank=4, dropout=0.5))
    assert torch.equal(logits(llama), logits(llama)), "evaluation drops nothing"
    llama.train()
    assert not torch.equal(llama(IDS).logits, llama(IDS).logits), "training drops at random"


# round trip


def test_a_saved_adapter_comes_back_bit_for_bit(pack: Pack, tmp_path: Path) -> None:
    model = trained(load_model(pack("llama", "toy")[1]), LoRASettings(rank=3, alpha=7, dropout=0.2))
    save_adapter(model, tmp_path, base="base")
    again = load_model(pack("llama", "toy")[1])
    assert set(load_adapter(again, tmp_path)) == {path for path, _ in adapter_layers(model)}
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    layer = next(layer for _, layer in adapter_layers(again))
    assert (layer.dropout, layer.scale) == (0.2, {"default": 7 / 3})


def test_a_loaded_adapter_can_go_on_training(pack: Pack, tmp_path: Path) -> None:
    save_adapter(trained(load_model(pack("llama")[1])), tmp_path, base="base")
    model = load_model(pack("llama")[1])
    paths = load_adapter(model, tmp_path, trainable=True)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {f"{path}.lora_{factor}.default" for path in paths for factor in "AB"}


def test_two_adapters_on_one_model_add_up(pack: Pack, tmp_path: Path) -> None:
    folder = pack("llama")[1]
    both = load_model(folder)
    add_lora(both, LoRASettings(rank=4, targets=("q_proj",), seed=1), "first")
    add_lora(both, LoRASettings(rank=2, targets=("q_proj", "v_proj"), seed=2), "second")
    randomize(both)
    trains = {name.rpartition(".")[2] for name, p in both.named_parameters() if p.requires_grad}
    assert trains == {"second"}, "the first is frozen when a second comes"
    for name in ("first", "second"):
        save_adapter(both, tmp_path / name, base="base", name=name)
    again = load_model(folder)
    for name in ("second", "first"):
        load_adapter(again, tmp_path / name, name)
    torch.testing.assert_close(logits(again), logits(both))


def test_the_record_says_which_base_and_which_settings(pack: Pack, tmp_path: Path) -> None:
    model, settings = (
        load_model(pack("llama", "toy")[1]),
        LoRASettings(rank=4, targets=("q_proj", "k_proj")),
    )
    save_adapter(trained(model, settings), tmp_path, base="org/base", settings=settings)
    record = json.loads((tmp_path / "modulora.json").read_text())
    assert record["base"]["name"] == "org/base"
    assert record["base"]["quantizers"] == [{"quantizer": "toy", "options": {"levels": 127}}]
    assert record["settings"] == asdict(settings) | {"targets": ["q_proj", "k_proj"]}
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "org/base"
    )


def test_without_its_last_file_a_folder_is_no_adapter(llama: nn.Module, tmp_path: Path) -> None:
    save_adapter(trained(llama), tmp_path, base="base")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"expected adapter_config.json in it, found none"):
        adapter_deltas(tmp_path)


def test_adapter_config_is_written_after_the_other_files(llama: nn.Module, tmp_path: Path) -> None:
    """A folder in the way of the weights stops the writing in the middle, as a full disk would."""
    (tmp_path / "adapter_model.safetensors").mkdir()
    (tmp_path / "adapter_config.json").write_text("{}")  # of an older adapter
    with pytest.raises(OSError, match="adapter_model"):
        save_adapter(trained(llama), tmp_path, base="base")
    assert not (tmp_path / "adapter_config.json").exists()


def test_deltas_are_what_the_layers_add(llama: nn.Module, tmp_path: Path) -> None:
    trained(llama)
    save_adapter(llama, tmp_path, base="base")
    deltas = adapter_deltas(tmp_path)
    layers = dict(adapter_layers(llama))
    assert set(deltas) == set(layers)
    for path, delta in deltas.items():
        layer = layers[path]
        x = torch.randn(3, layer.in_features)
        added = delta.scale * (x @ delta.A.T) @ delta.B.T
        without = QuantLinear(layer.weight, layer.bias)
        torch.testing.assert_close(added, layer.eval()(x) - without(x), rtol=1e-3, atol=1e-4)
        assert delta.shape == (layer.out_features, layer.in_features)
    assert deltas.get("model.layers.9.mlp.up_proj") is None


# adapters that don't fit


def test_another_architecture_is_refused_with_both_names_and_the_layer(
    pack: Pack, tmp_path: Path
) -> None:
    save_adapter(trained(load_model(pack("gpt2")[1])), tmp_path, base="org/gpt")
    with pytest.raises(AdapterError, match=r"made for the base org/gpt, it doesn't fit .*packed: there is no "
                                           r"layer transformer\.h\.0\.\S+ \(and 7 more\)"):  # fmt: skip
        load_adapter(load_model(pack("llama")[1]), tmp_path)


def test_other_shapes_are_refused_with_the_layer_and_both_shapes(
    llama: nn.Module, pack: Pack, tmp_path: Path
) -> None:
    save_adapter(trained(load_model(pack("llama")[1])), tmp_path, base="org/base")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file(tensors | {key: torch.zeros(4, 33)}, file)
    misfit = (
        r"model\.layers\.1\.mlp\.up_proj: expected an adapter of \[48, 32\], got one of \[48, 33\]"
    )
    with pytest.raises(AdapterError, match=rf"made for the base org/base.*{misfit}"):
        load_adapter(llama, tmp_path)
    assert not list(adapter_layers(llama)), "nothing is changed before all is checked"


def test_a_deeper_model_of_the_same_widths_is_refused(pack: Pack, tmp_path: Path) -> None:
    """All layers of the adapter are there; only the record knows that there were no others."""
    from modulora_core.tests.tiny_models import tiny_config

    config = tiny_config("llama")
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "verbatim")
    save_adapter(trained(load_model(pack("llama")[1])), tmp_path / "adapter", base="org/base")
    with pytest.raises(
        AdapterError, match=r"made for the base org/base.*different linear layers beside"
    ):
        load_adapter(load_model(tmp_path / "packed"), tmp_path / "adapter")


def test_a_layer_that_isnt_quantized_here_is_named(pack: Pack, tmp_path: Path) -> None:
    save_adapter(trained(load_model(pack("llama")[1])), tmp_path, base="org/base")
    partly = load_model(pack("llama", exclude=("model.layers.0.mlp.up_proj",))[1])
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp\.up_proj isn't quantized there"):
        load_adapter(partly, tmp_path)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.name == "modulora_core.adapters.lora" and r.levelno == logging.WARNING
    ]


def test_another_quantization_of_the_base_is_one_warning(
    pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_adapter(trained(load_model(pack("llama", "toy")[1])), tmp_path, base="org/base")
    load_adapter(load_model(pack("llama", "toy")[1]), tmp_path)
    assert warnings_of(caplog) == [], "the same base is no reason to warn"
    model = load_model(pack("llama", "verbatim")[1])
    assert load_adapter(model, tmp_path)
    (warning,) = warnings_of(caplog)
    assert (
        "trained on org/base quantized with toy (levels=127), used on it quantized with verbatim"
        in warning
    )


def test_the_same_base_in_another_dtype_is_no_reason_to_warn(
    pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_adapter(trained(load_model(pack("llama", "toy")[1])), tmp_path, base="org/base")
    load_adapter(load_model(pack("llama", "toy")[1], dtype="bfloat16"), tmp_path)
    assert warnings_of(caplog) == []


def test_another_model_of_the_same_shapes_is_one_warning(
    llama: nn.Module, pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(load_model(pack("llama")[1]))
    model.model.norm.weight.data.mul_(1.1)
    save_adapter(model, tmp_path, base="org/chat")
    load_adapter(llama, tmp_path)
    (warning,) = warnings_of(caplog)
    assert "made for the base org/chat" in warning
    assert "other weights" in warning


def test_a_name_that_is_taken_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    save_adapter(trained(llama), tmp_path, base="base")
    with pytest.raises(AdapterError, match=r"adapter 'default': .* has one of that name already"):
        add_lora(llama, LoRASettings())
    with pytest.raises(AdapterError, match=r"adapter 'default': .* has one of that name already"):
        load_adapter(llama, tmp_path)


def test_the_bases_name_is_the_checkpoints_source_by_default(pack: Pack, tmp_path: Path) -> None:
    dense, packed = pack("llama")
    save_adapter(trained(load_model(packed)), tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == dense.name
    )


def test_an_adapter_that_isnt_there_cant_be_saved(llama: nn.Module, tmp_path: Path) -> None:
    trained(llama)
    with pytest.raises(AdapterError, match=r"adapter 'other': .* has none of that name"):
        save_adapter(llama, tmp_path / "a", base="base", name="other")
    assert not (tmp_path / "a").exists()
