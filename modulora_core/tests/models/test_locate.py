"""MODEL is found, or the message says where we looked. Tokenizer files come along."""

import importlib
import sys
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from modulora_core.errors import ModelError
from modulora_core.models import installed_formats, open_dense
from modulora_core.models.locate import locate
from modulora_core.tests.fake_hub import COMMIT
from modulora_core.tests.tiny_models import save_tiny_model
from modulora_core.tests.tiny_tokenizer import make_tokenizer


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an installed package that must not be imported."""
    folder = tmp_path / "tiny_language_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return folder


@pytest.mark.usefixtures("toy")
def test_a_folder_or_a_file_is_found(tmp_path):
    found = locate(str(tmp_path))
    assert (found.kind, found.folder, found.file, found.name) == (
        "folder",
        tmp_path,
        None,
        tmp_path.name,
    )
    (tmp_path / "a.single").touch()
    found = locate(str(tmp_path / "a.single"))
    assert found.file.path == tmp_path / "a.single"
    assert (found.kind, found.folder, found.name) == ("single", tmp_path, "a.single")


@pytest.mark.usefixtures("toy")
def test_a_file_without_suffix_is_known_by_its_first_bytes(tmp_path, monkeypatch):
    path = tmp_path / "sha256-12ab"
    path.write_bytes(b"TOY1 and more")
    with pytest.raises(ModelError, match="got the file sha256-12ab"):
        locate(str(path))
    single = next(x for x in installed_formats.installed() if x.spec.file_suffix == ".single")
    known = replace(single, spec=single.spec.model_copy(update={"file_magic": "TOY1"}))
    monkeypatch.setattr(installed_formats, "installed", lambda: iter([known]))
    found = locate(str(path))
    assert (found.kind, found.file.path) == ("single", path)
    path.write_bytes(b"TOY")
    with pytest.raises(ModelError, match="got the file sha256-12ab"):
        locate(str(path))
    assert installed_formats.file_format(tmp_path) is None
    assert installed_formats.file_format("\0") is None
    assert installed_formats.file_format("a" * 5000) is None


@pytest.mark.usefixtures("toy")
def test_other_files_and_revisions_of_folders_are_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ModelError, match=r"or a file \*.*\.single, got the file model\.safetensors"
    ):
        locate(str(tmp_path / "model.safetensors"))
    for model in (str(tmp_path), "package:anything"):
        for named, revision in ((model, "main"), (f"{model}@main", None)):
            with pytest.raises(ModelError, match="only a Hub repository has revisions"):
                locate(named, revision)


@pytest.mark.usefixtures("toy")
def test_a_package_is_found_without_being_imported(package):
    (package / "data").mkdir()
    (package / "data" / "tiny.single").touch()
    found = locate("package:tiny-language-model")
    tiny = package / "data" / "tiny.single"
    assert (found.kind, found.file.path, found.revision) == ("package", tiny, None)
    assert "tiny_language_model" not in sys.modules


@pytest.mark.usefixtures("toy")
def test_a_package_must_have_one_file(package):
    for files, told in ((), "none"), (("a.single", "b.single"), r"a\.single, b\.single"):
        for file in files:
            (package / file).touch()
        with pytest.raises(ModelError, match=rf"one file \*.*\.single in the package, got {told}"):
            locate("package:tiny_language_model")
    with pytest.raises(ModelError, match=r"isn't installed; check the name"):
        locate("package:no_such_model")
    for name in ("", "a.b", "a/b", "1x"):
        with pytest.raises(ModelError, match="expected package:NAME"):
            locate(f"package:{name}")


def test_a_hub_repository_is_opened_from_the_cache(offline_hub):
    save_tiny_model("llama", offline_hub, max_shard_size="20KB")
    source = open_dense("org/tiny")
    source.check_whole()
    assert not source.unplaced
    assert source.config.name_or_path == "org/tiny"
    expected = {"kind": "hub", "name": "org/tiny", "revision": COMMIT}
    assert source.identity().items() >= expected.items()


def test_a_hub_id_may_name_a_revision(offline_hub, tmp_path):
    save_tiny_model("llama", offline_hub)
    for revision in ("main", COMMIT):
        found = open_dense(f"org/tiny@{revision}")
        assert found.location.model == found.config.name_or_path == f"org/tiny@{revision}"
        expected = {"kind": "hub", "name": "org/tiny", "revision": COMMIT}
        assert found.identity().items() >= expected.items()
    with pytest.raises(ModelError, match="Hub at revision v7 didn't give it"):
        open_dense("org/tiny@v7")
    with pytest.raises(ModelError, match="expected one revision, got 'v7' too"):
        open_dense("org/tiny@main", revision="v7")
    with pytest.raises(ModelError, match="expected a usable path"):
        open_dense(f"{'a' * 5000}@main")
    folder = save_tiny_model("llama", tmp_path / "name@main")
    assert open_dense(str(folder)).location.folder == folder


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path):
    folder, out = save_tiny_model("llama", tmp_path / "model"), tmp_path / "out"
    make_tokenizer().save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for other in ("modeling_evil.py", "pytorch_model.bin", "README.md"):
        (folder / other).touch()
    source = open_dense(str(folder))
    names = source.copy_tokenizer(out)
    assert {
        "tokenizer.json",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
    } <= {*names}
    assert {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()} == set(names)
    assert not any(name.endswith((".py", ".bin", ".md", ".safetensors")) for name in names)
    text = "hello world"
    assert source.tokenizer()(text).input_ids == AutoTokenizer.from_pretrained(out)(text).input_ids
