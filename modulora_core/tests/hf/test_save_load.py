"""Adapters are saved and loaded. A misfit is refused; another base gives a warning."""

import json
import re
from dataclasses import asdict, replace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from modulora_core.errors import AdapterError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.peft_format import read_adapter
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.layers import LoRALayer
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.adapting import add_lora
from modulora_core.lora.settings import LoRASettings
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import IDS, logits, trained
from modulora_core.tests.fake_hub import COMMIT, serve_repository
from modulora_core.tests.tiny_models import save_tiny_model, tiny_config

CONFIG, WEIGHTS, RECORD, SCALES = FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "modulora.json",
    "modulora_scales.safetensors",
]
PLAIN = LoRASettings(rank=3, alpha=7, dropout=0.2, targets=("q_proj", "k_proj"))
SCALED = replace(PLAIN, train_scales=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama(pack):
    return load_model(pack("llama", "toy")[1])


@pytest.fixture
def saved(pack, tmp_path):
    """An adapter with channel scales for the tiny Llama."""
    model = trained(load_model(pack("llama", "toy")[1]), SCALED)
    save_adapter(model, tmp_path / "saved", base="org/base", settings=SCALED)
    return tmp_path / "saved"


def read(file):
    return json.loads(file.read_text())


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("settings", [PLAIN, SCALED], ids=["plain", "with scales"])
def test_a_saved_adapter_comes_back_bit_for_bit(llama, pack, tmp_path, settings):
    trained(llama, settings)
    expected, trainable = logits(llama), trains(llama)
    save_adapter(llama, tmp_path, base="org/base", settings=settings)
    scaled = settings.train_scales
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES[: 4 if scaled else 3]
    record, config = read(tmp_path / RECORD), read(tmp_path / CONFIG)
    assert (record["format"], record.get("channel_scales")) == ((2, True) if scaled else (1, False))
    assert record["base"]["name"] == config["base_model_name_or_path"] == "org/base"
    assert record["base"]["quantizers"] == [{"quantizer": "toy", "options": {"levels": 127}}]
    assert record["settings"] == asdict(settings) | {"targets": ["q_proj", "k_proj"]}

    again = load_model(pack("llama", "toy")[1])
    assert set(load_adapter(again, tmp_path)) == {path for path, _ in adapter_layers(llama)}
    assert torch.equal(logits(again), expected)
    assert trains(again) == set()
    layer = next(layer for _, layer in adapter_layers(again))
    assert (layer.dropout["default"].p, layer.scale) == (0.2, {"default": 7 / 3})
    other = load_model(pack("llama", "toy")[1])
    load_adapter(other, tmp_path, trainable=True)
    assert trains(other) == trainable


def test_an_adapter_remembers_the_commit_of_its_base(offline_hub, toy, tmp_path):
    save_tiny_model("llama", offline_hub)
    quantize("org/tiny@main", tmp_path / "packed", "toy")
    adapted = trained(load_model(tmp_path / "packed"))
    for base, expected in ((None, ("org/tiny", COMMIT)), ("org/other", ("org/other", None))):
        save_adapter(adapted, tmp_path / "adapter", base=base)
        config = read(tmp_path / "adapter" / CONFIG)
        assert (config["base_model_name_or_path"], config["revision"]) == expected


@pytest.mark.parametrize("file", [WEIGHTS, SCALES])
def test_an_unfinished_folder_is_no_adapter(llama, tmp_path, file):
    """A folder in the way of a file stops the writing, as a full disk would."""
    (tmp_path / file).mkdir()
    (tmp_path / CONFIG).write_text("{}")  # of an older adapter
    with pytest.raises(OSError, match=file.partition(".")[0]):
        save_adapter(trained(llama, SCALED), tmp_path)
    with pytest.raises(AdapterError, match=r"expected adapter_config\.json in it, found none"):
        read_adapter(tmp_path)


def test_an_adapter_is_saved_and_loaded_by_its_name(llama, tmp_path):
    trained(llama)
    with pytest.raises(AdapterError, match=r"'other': .* has no adapter of that name"):
        save_adapter(llama, tmp_path / "a", name="other")
    assert not (tmp_path / "a").exists()
    save_adapter(llama, tmp_path / "a")
    with pytest.raises(AdapterError, match=r"'default': .* already has an adapter of that name"):
        load_adapter(llama, tmp_path / "a")


# an adapter and a model that do not fit together


def test_other_shapes_are_refused_before_the_model_changes(llama, saved):
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file(load_file(saved / WEIGHTS) | {key: torch.zeros(3, 33)}, saved / WEIGHTS)
    scales = {"model.layers.1.self_attn.q_proj.input_scale": torch.ones(33)}
    save_file(load_file(saved / SCALES) | scales, saved / SCALES)
    misfit = r"q_proj: expected an adapter of \[32, 32\], got \[32, 33\]"
    with pytest.raises(AdapterError, match=rf"made for the base org/base.*{misfit}"):
        load_adapter(llama, saved)
    assert not list(adapter_layers(llama))


def test_a_deeper_model_of_the_same_widths_is_refused(toy, saved, tmp_path):
    """It has every layer of the adapter; only the record shows that it has others."""
    config = tiny_config("llama")
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "packed", "verbatim")
    with pytest.raises(AdapterError, match=r"base org/base.*layers without an adapter differ"):
        load_adapter(load_model(tmp_path / "packed"), saved)


def test_another_quantization_of_the_base_is_one_warning(pack, saved, caplog):
    toy, other = pack("llama", "toy")[1], pack("llama", "verbatim")[1]
    caplog.clear()
    for dtype in ("float32", "bfloat16"):
        load_adapter(load_model(toy, dtype=dtype), saved)
    assert caplog.messages == []
    load_adapter(load_model(other), saved)
    (warning,) = caplog.messages
    assert "trained on org/base quantized with toy (levels=127), used on" in warning
    assert "quantized with verbatim: results may differ" in warning


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (False, False, "made for the base org/base; .* has the same shapes and other weights"),
        (False, True, "quantization tuned the norms of the second: results may differ"),
        (True, False, "quantization tuned the norms of the first"),
        (True, True, "quantization tuned the norms of both"),
    ],
)
def test_other_norms_are_one_warning_which_says_if_they_were_tuned(
    pack, tmp_path, caplog, first, second, message
):
    def model(tuned):
        loaded = load_model(pack("llama", "toy")[1])
        if tuned:
            of = loaded.config.quantization_config
            of.record = of.record.model_copy(update={"calibration": {"tuning": {"epochs": 1}}})
        return loaded

    source = model(first)
    source.model.norm.weight.data.mul_(1.1)
    save_adapter(trained(source), tmp_path, base="org/base")
    caplog.clear()
    load_adapter(model(second), tmp_path)
    (warning,) = caplog.messages
    assert re.search(message, warning), warning


# damaged files


def changed(**tensors):
    """Replace or remove channel scales of the first q_proj."""

    def damage(folder):
        stored = load_file(folder / SCALES)
        for name, tensor in tensors.items():
            stored.pop(f"model.layers.0.self_attn.q_proj.{name}", None)
            if tensor is not None:
                stored[f"model.layers.0.self_attn.q_proj.{name}"] = tensor
        save_file(stored, folder / SCALES)

    return damage


def edited(file, **values):
    def damage(folder):
        data = read(folder / file) | values
        (folder / file).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return damage


def weights(**shapes):
    tensors = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    return lambda folder: save_file(tensors, folder / WEIGHTS)


A, B = "base_model__model__x__lora_A__weight", "base_model__model__x__lora_B__weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).write_text("{"), r"adapter_config\.json: Invalid JSON"),
        (edited(CONFIG, lora_alpha=float("nan")), "expected a finite alpha, got nan"),
        (edited(RECORD, format=99), r"modulora\.json: format: expected 1 or 2, got 99"),
        (edited(RECORD, settings={"dropout": "x"}), "dropout: expected a valid number"),
        (lambda f: (f / WEIGHTS).write_bytes(b"short"), "expected a readable safetensors file"),
        (lambda f: (f / WEIGHTS).unlink(), "expected adapter_model.safetensors in it"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is a pickle: load it with peft"),
        (weights(**{A: (2, 4)}), r"x: expected lora_A .* got \[2, 4\] and None"),
        (weights(x__lora_A__weight=(2, 4)), "expected names base_model.* got x.lora_A.weight"),
        (changed(input_scale=None), r"q_proj\.input_scale: expected .*\[32\]\), got None"),
        (changed(output_scale=torch.ones(32).half()), r"float32, \[32\]\), got .*float16, \[32\]"),
        (changed(input_scale=torch.full((32,), torch.inf)), "q_proj.input_scale: .* NaN or Inf"),
        (changed(bias=torch.ones(32)), r"q_proj\.bias: expected None, got .*\[32\]"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name_before_the_model_changes(
    llama, saved, damage, message
):
    damage(saved)
    with pytest.raises(AdapterError, match=message):
        load_adapter(llama, saved)
    assert not list(adapter_layers(llama))


# from the Hub


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A Hub where every repository is the saved adapter, and an empty cache."""
    with serve_repository(saved) as url:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield


@pytest.mark.parametrize(("name", "revision"), [("org/adapter", "main"), ("org/adapter@v2", "v2")])
@pytest.mark.usefixtures("hub")
def test_an_adapter_from_the_hub_comes_with_its_scales(name, revision, llama, tmp_path):
    load_adapter(llama, name)
    assert all(layer.input_scale for _, layer in adapter_layers(llama))
    asked = [*(tmp_path / "hub" / "models--org--adapter" / "refs").iterdir()]
    assert [path.name for path in asked] == [revision]


def test_save_pretrained_writes_the_adapters(llama, pack, tmp_path):
    """So a Trainer of transformers saves what it trained."""
    trained(llama, PLAIN)
    add_lora(llama, SCALED, name="second")
    expected = logits(llama)
    llama.save_pretrained(tmp_path, state_dict=llama.state_dict())
    written = load_file(tmp_path / "model.safetensors")  # for Trainer's resume, without the base
    assert {*written} == {n for n, p in llama.named_parameters() if p.requires_grad}
    llama.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "model.safetensors").exists()
    again = load_model(pack("llama", "toy")[1])
    load_adapter(again, tmp_path)
    load_adapter(again, tmp_path / "second", name="second")
    assert torch.equal(logits(again), expected)


def test_each_adapter_keeps_its_dropout(llama, tmp_path):
    add_lora(llama, replace(PLAIN, dropout=0.3), "mine")
    add_lora(llama, replace(PLAIN, dropout=0.0), "other")
    for name, expected in (("mine", 0.3), ("other", 0.0)):
        save_adapter(llama, tmp_path / name, name=name)
        assert read_adapter(tmp_path / name).dropout == expected
    logits(llama)  # evaluation drops nothing
    with pytest.raises(AdapterError, match="expected one dropout in training, got 0"):
        llama.train()(IDS)
    for active, drops in ((["mine"], True), (["other"], False)):
        for layer in (module for module in llama.modules() if isinstance(module, LoRALayer)):
            layer.active = active
            nn.init.normal_(layer.lora_B[active[0]])
        assert torch.equal(llama(IDS).logits, llama(IDS).logits) != drops
