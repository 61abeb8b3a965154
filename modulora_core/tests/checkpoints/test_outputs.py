"""An output folder appears whole or not at all, and nobody else's files are touched."""

import shutil
from pathlib import Path

import pytest

from modulora_core.checkpoints.outputs import (
    MARKER,
    REQUEST,
    check_digests,
    check_disk_space,
    check_output,
    new_file,
    only_writer,
    partial_name,
    whole_or_nothing,
    write_digests,
)
from modulora_core.errors import CheckpointError, DiskSpaceError, OutputError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out"


def begin(out, name):
    """A run that wrote one file and was stopped."""
    with pytest.raises(KeyboardInterrupt), whole_or_nothing(out) as folder:
        (folder / name).write_text("x")
        assert not out.exists()
        raise KeyboardInterrupt


def test_a_folder_appears_whole_or_not_at_all(out):
    begin(out, "half")
    assert not out.exists()
    with whole_or_nothing(out) as folder:
        assert [path.name for path in folder.iterdir()] == [MARKER], "it is begun anew"
        (folder / "whole").write_text("x")
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert not partial_name(out).exists()


def test_work_that_failed_and_cannot_be_resumed_leaves_nothing(out):
    begin(out, "half")
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_vanished_is_named(out):
    with (
        pytest.raises(OutputError, match=r"temporary folder .*out\.partial: somebody removed it"),
        whole_or_nothing(out) as folder,
    ):
        shutil.rmtree(folder)
        raise RuntimeError("Parent directory does not exist")  # torch's words
    with (
        pytest.raises(OutputError, match=r"output folder .*/out: somebody removed it"),
        only_writer(out),
    ):
        shutil.rmtree(out)
        raise RuntimeError("Parent directory does not exist")
    with pytest.raises(RuntimeError, match="another"), only_writer(out):
        raise RuntimeError("another")


def test_work_that_can_be_resumed_is_never_removed(out):
    begin(out, REQUEST)
    refusal = r"out\.partial: .*unfinished run of quantize; go on with it with --resume, or remove"
    with pytest.raises(OutputError, match=refusal), whole_or_nothing(out):
        pass
    with pytest.raises(OutputError, match=refusal):
        check_output(out)
    check_output(out, resume=True)
    assert (partial_name(out) / REQUEST).read_text() == "x"


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_run_writes_is_left_alone(out, resume):
    pytest.importorskip("fcntl")
    busy = "another run is writing it; wait"
    with whole_or_nothing(out) as folder:
        (folder / "half").write_text("x")
        with pytest.raises(OutputError, match=busy):
            check_output(out, resume=resume)
        with pytest.raises(OutputError, match=busy), whole_or_nothing(out, resume=resume):
            pass
    assert [path.name for path in out.iterdir()] == ["half"]
    with only_writer(out), pytest.raises(OutputError, match=busy), only_writer(out):
        pass


def test_an_empty_folder_may_be_filled_and_others_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with whole_or_nothing(tmp_path / "folder") as folder:
        (folder / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").write_text("x")
    for name, message in (
        ("folder", r"found 1 entries \(mine\)"),
        ("file", "found a file"),
        ("new", r"new\.partial: .*found something else; remove or rename it"),
    ):
        with pytest.raises(OutputError, match=message), whole_or_nothing(tmp_path / name):
            pass
    assert (tmp_path / "new.partial" / "mine").exists()
    assert (tmp_path / "folder" / "mine").read_text() == "x"


def test_work_killed_before_its_folder_was_renamed_may_be_resumed(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with whole_or_nothing(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            patch.setattr(Path, "replace", killed)
    with whole_or_nothing(tmp_path / "out", resume=True) as folder:
        assert (folder / "a").read_text() == "1"


def test_too_little_disk_space_is_refused_with_both_sizes(out):
    check_disk_space(out, 1)
    with pytest.raises(DiskSpaceError, match=r"MiB would be written, [\d,]+ MiB are free"):
        check_disk_space(out, 2**62)


def test_digests_find_a_changed_and_a_missing_file(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    with pytest.raises(CheckpointError, match="SHA256SUMS: expected the digests"):
        check_digests(tmp_path)
    write_digests(tmp_path)
    assert check_digests(tmp_path) == 2
    # of b"one", by sha256sum
    known = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed  a"
    assert (tmp_path / "SHA256SUMS").read_text().splitlines()[0] == known
    (tmp_path / "b").write_bytes(b"twp")
    with pytest.raises(CheckpointError, match="b: expected the SHA-256 3fc4ccfe7458…, got"):
        check_digests(tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(CheckpointError, match="a: expected the SHA-256 7692c3ad3540…, got no file"):
        check_digests(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "a\0"])
def test_a_digest_of_a_file_outside_is_refused(name, tmp_path):
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "outside").write_text("text")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="expected names in the folder, got"):
        check_digests(folder)


def test_a_new_file_has_one_writer(tmp_path):
    out = tmp_path / "out.bin"
    with new_file(out, ".bin") as partial:
        partial.write_text("first")
        with pytest.raises(OutputError, match="another run is writing it"), new_file(out, ".bin"):
            pass
        assert partial.read_text() == "first"
    assert out.read_text() == "first"
    with pytest.raises(OutputError, match="expected a new file"), new_file(out, ".bin"):
        pass
    partial.mkdir()
    out.unlink()
    with pytest.raises(OutputError, match="found a folder"), new_file(out, ".bin"):
        pass
