"""The file that says which quantizer packs which layers."""

import pytest

from modulora_core.checkpoints.opening import open_packed
from modulora_core.cli import main
from modulora_core.errors import OptionError, PluginError
from modulora_core.quantization.quantize import Assignment, Choice, quantize
from modulora_core.tests.stopped_runs import stored
from modulora_core.tests.tiny_models import save_tiny_model

TEXT = """
default: toy
layers:
  "model.layers.0.*": {quantizer: toy, options: {levels: 7}}
  "*.0.mlp.up_proj": toy:levels=15
  "*.1.mlp.*.weight": null
head: verbatim
"""
ASSIGNMENT = Assignment(
    default="toy",
    layers={
        "model.layers.0.*": Choice("toy", {"levels": 7}),
        "*.0.mlp.up_proj": "toy:levels=15",
        "*.1.mlp.*.weight": None,
    },
    head=Choice("verbatim"),
)


@pytest.fixture
def source(toy, tmp_path):
    return str(save_tiny_model("llama", tmp_path / "source"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "mixed.yaml").write_text(text)
        return tmp_path / "mixed.yaml"

    return write


def test_the_last_match_counts_and_null_leaves_layers_dense(source, tmp_path, write):
    result = quantize(source, tmp_path / "out", Assignment.read(write(TEXT)))
    record = open_packed(tmp_path / "out").record
    recipes = {name: record.recipes[site.recipe] for name, site in record.items()}
    levels = {name: recipe.options.get("levels") for name, recipe in recipes.items()}
    assert levels["model.layers.0.self_attn.q_proj.weight"] == 7
    assert levels["model.layers.0.mlp.up_proj.weight"] == 15
    assert levels["model.layers.1.self_attn.q_proj.weight"] == 127
    assert recipes["lm_head.weight"].quantizer == "verbatim"
    assert result.kept["dense in the assignment"] == [
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    assert (result.quantizer, result.options) == ("toy", {"levels": 127})


def test_a_file_python_and_options_give_the_same_bytes(source, tmp_path, write, capsys):
    quantize(source, tmp_path / "python", ASSIGNMENT)
    words = ["quantize", source, str(tmp_path / "file"), "--assignment", str(write(TEXT))]
    assert main(words) == 0
    assert stored(tmp_path / "python") == stored(tmp_path / "file")
    words = ["quantize", source, str(tmp_path / "options"), "-q", "toy", "--quantize-head"]
    override = ["--override", "*.0.mlp.*=toy:levels=15"]
    assert main([*words, "verbatim", *override, "--json"]) == 0
    same = "default: toy\nlayers: {'*.0.mlp.*': 'toy:levels=15'}\nhead: verbatim"
    quantize(source, tmp_path / "same", Assignment.read(write(same)))
    assert stored(tmp_path / "options") == stored(tmp_path / "same")


WRONG = {
    "default: toy\nhaed: toy": (OptionError, r"mixed\.yaml: unknown option 'haed'.*'head'"),
    "layers: {}": (OptionError, r"mixed\.yaml: option 'default': expected a value, got none"),
    "default: toy\nlayers: {'a.*': [toy]}": (OptionError, r"option 'layers\.a\.\*': expected NAME"),
    "default: toy\nlayers:\n  a: toy\n  a: toy": (OptionError, r"key 'a' twice, first in line 3"),
    "default: toy\nlayers: {'*.upproj': toy}": (
        OptionError,
        r"mixed\.yaml: layers, '\*\.upproj': expected a pattern that matches .* 14 linear layers",
    ),
    "default: toy\nlayers: {'*.up_proj': tow}": (PluginError, r"layers, '\*\.up_proj': .*toy"),
    "default: toy\nhead: tow": (PluginError, r"mixed\.yaml: head: .*toy"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_refused_by_its_key(text, source, tmp_path, write):
    error, message = WRONG[text]
    path = write(text)
    with pytest.raises(error, match=message):
        quantize(source, tmp_path / "out", Assignment.read(path))
    assert not (tmp_path / "out").exists()
