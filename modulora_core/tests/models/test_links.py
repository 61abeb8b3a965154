"""Links of a stranger's folder lead to files of the folder, or to the blobs of its Hub entry."""

import shutil
from pathlib import Path

import pytest

from modulora_core import quantize
from modulora_core.errors import AdapterError, ModelError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapting import add_lora
from modulora_core.models.locate import locate
from modulora_core.models.tokenizer import COPIED_FILES

SECRET = "a private key"
NAMES = [name.replace("*", "x") for name in COPIED_FILES]


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def folder(pack, tmp_path):
    return Path(shutil.copytree(pack("llama")[0], tmp_path / "model"))


def link(path, target):
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("kind", ["absolute", "relative", "through another link", "folder"])
@pytest.mark.parametrize("name", NAMES[::4])
def test_a_link_to_a_file_elsewhere_is_refused(name, kind, folder, secret, tmp_path):
    if kind == "folder":
        link(folder / "additional_chat_templates", secret.parent)
        named = "additional_chat_templates"
    else:
        target = secret
        if kind == "relative":
            target = "../" * (1 + name.count("/")) + "home/id_rsa"
        elif kind == "through another link":
            (folder / "weights.bin").symlink_to(secret)
            target = folder / "weights.bin"
        link(folder / name, target)
        named = name
    with pytest.raises(ModelError, match=f"{folder}/{named}: expected a file of this folder, got"):
        quantize(str(folder), tmp_path / "out", "verbatim")
    assert not (tmp_path / "out").exists()


def test_links_inside_and_to_weights_are_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "weights")
    link(folder / "model.safetensors", tmp_path / "weights")
    (folder / "extra").mkdir()
    (folder / "generation_config.json").rename(folder / "extra" / "g.json")
    link(folder / "generation_config.json", "extra/g.json")
    link(tmp_path / "named", folder)
    quantize(str(tmp_path / "named"), tmp_path / "out", "verbatim")
    assert not (tmp_path / "out" / "generation_config.json").is_symlink()


def test_the_hub_s_cache_is_followed_to_the_blobs_of_its_entry(folder, secret, tmp_path):
    entry = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = entry / "snapshots" / "0123", entry / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    quantize(str(snapshot), tmp_path / "out", "verbatim")
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text(SECRET)
    link(snapshot / "tokenizer.json", "../../../models--org--other/blobs/secret")
    with pytest.raises(ModelError, match=r"tokenizer\.json: expected a file of this folder"):
        locate(str(snapshot))


@pytest.mark.parametrize("name", ["adapter_config.json", "modulora.json"])
def test_an_adapter_s_links_too(name, pack, secret, tmp_path):
    model = load_model(pack("llama")[1], device="cpu")
    add_lora(model)
    save_adapter(model, tmp_path / "adapter")
    link(tmp_path / "adapter" / name, secret)
    with pytest.raises(AdapterError, match=f"{name}: expected a file of this folder"):
        load_adapter(load_model(pack("llama")[1], device="cpu"), tmp_path / "adapter")
