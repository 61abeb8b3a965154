"""A packed model is saved with a model card, and uploaded to the Hub as it is saved."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from modulora_core import load_model
from modulora_core.checkpoints.outputs import DIGESTS
from modulora_core.hf import publishing
from modulora_core.tests.adapted_models import logits, trained


class Hub:
    """Repositories in a folder, in place of HfApi."""

    def __init__(self, root):
        self.root = root

    def create_repo(self, repo_id, **options):
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, name, **_):
        return (self.root / repo_id / name).is_file()

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **_):
        for file in Path(folder_path).iterdir():
            if file.name not in (ignore_patterns or ()):
                (self.root / repo_id / file.name).write_bytes(file.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(publishing, "HfApi", lambda token: fake)
    return fake.root


def test_quantize_and_save_pretrained_write_a_card(pack, tmp_path):
    folder = pack("llama", "toy")[1]
    (tmp_path / DIGESTS).write_text("of another model\n")
    load_model(folder, device="cpu").save_pretrained(tmp_path)
    assert not (tmp_path / DIGESTS).exists()
    assert "README.md" not in (folder / DIGESTS).read_text(), "people edit a card"
    card = (tmp_path / "README.md").read_text()
    assert card == (folder / "README.md").read_text()
    assert "# dense, quantized" in card
    assert "bits per\nweight, scales included" in card
    assert '| toy | 15,360 | {"levels": 127} |' in card
    assert "`modulora-core modulora-toy`" in card
    data = ModelCard(card).data
    assert data.tags == ["modulora", "quantized"]
    assert data.base_model is None, "a folder of this machine is no model of the Hub"


def test_push_to_hub_uploads_what_save_pretrained_writes(pack, hub):
    model = load_model(pack("llama", "toy")[1], device="cpu")
    assert model.push_to_hub("me/packed", private=True) == "https://hub/me/packed/commit/1"
    assert torch.equal(logits(load_model(hub / "me/packed", device="cpu")), logits(model))
    card = hub / "me/packed/README.md"
    assert "quantized" in card.read_text()
    card.write_text("by hand")
    model.push_to_hub("me/packed")
    assert card.read_text() == "by hand"


def test_an_adapter_is_pushed_without_its_base(pack, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained(load_model(pack("llama", "toy")[1], device="cpu"))
    model.push_to_hub("me/adapter")
    model.save_pretrained("mine", push_to_hub=True)
    for repository in ("me/adapter", "mine"):
        names = {file.name for file in (hub / repository).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "modulora.json"}
