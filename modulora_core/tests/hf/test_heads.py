"""A packed folder gives its packed layers to every class of transformers, or an error."""

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from modulora_core import load_model, quantize
from modulora_core.checkpoints.record import QUANT_METHOD
from modulora_core.errors import CheckpointError
from modulora_core.packed_parameters import PackedParameter
from modulora_core.registry import Choice
from modulora_core.tests.tiny_models import ARCHITECTURES, EVERY_ARCHITECTURE, save_tiny_model

HEADS = ("llama", "llama-tied", "mixtral")
IDS = torch.tensor([[1, 5, 9, 30]])
TABLES = {
    "layers": {},
    "head": {"head": Choice("toy")},
    "embedding": {"embeddings": Choice("toy")},
    "both": {"head": Choice("toy"), "embeddings": Choice("toy")},
}


def classes(architecture):
    """All classes that transformers' Auto classes make of a config."""
    model_type, found = ARCHITECTURES[architecture][0], set()
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            entry = mapping.get(model_type, ())
            found |= {entry} if isinstance(entry, str) else {*entry}
    # JevForDecision asks for a config of its own
    return [getattr(transformers, name) for name in sorted(found - {"JevForDecision"})]


@pytest.fixture(scope="module")
def folders(toy, tmp_path_factory):
    made = {}

    def folder(architecture, tables):
        key = architecture, tables
        if key not in made:
            root = tmp_path_factory.mktemp(architecture)
            dense = save_tiny_model(architecture, root / "dense")
            made[key] = root / "packed"
            quantize(str(dense), made[key], "toy", **TABLES[tables])
        return made[key]

    return folder


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("architecture", HEADS)
def test_every_head(folders, architecture, tables):
    folder = folders(architecture, tables)
    whole = load_model(folder, device="cpu")
    with torch.no_grad():
        expected = whole.base_model(IDS).last_hidden_state
    heads = classes(architecture)
    assert len(heads) >= 5
    for head in heads:
        if head.base_model_prefix != type(whole).base_model_prefix:
            # transformers can't load a dense checkpoint of the causal model either
            with pytest.raises(CheckpointError, match=f"{head.__name__} has none of that name"):
                head.from_pretrained(folder)
            continue
        model = head.from_pretrained(folder, dtype="float32")
        with torch.no_grad():
            assert torch.equal(model.base_model(IDS).last_hidden_state, expected)
        assert all(isinstance(each.weight, PackedParameter) for each in packed_of(model, whole))


def packed_of(model, whole):
    """The layers of ``model`` in the places of packed linear layers of ``whole``'s base."""
    paths = [n for n, m in whole.base_model.named_modules() if hasattr(m, "weight")
             and isinstance(m.weight, PackedParameter)]  # fmt: skip
    return [model.base_model.get_submodule(path) for path in paths]


@EVERY_ARCHITECTURE
def test_transformers_alone_refuses_the_folder(folders, architecture, monkeypatch):
    """It knows no such method, and would fill packed layers with noise."""
    folder = folders(architecture, "both")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, QUANT_METHOD)
    for head in classes(architecture):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            head.from_pretrained(folder)
