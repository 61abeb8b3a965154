from __future__ import annotations

from pathlib import Path

import pytest

from modulora_core.checkpoints.outputs import (
    MARKER,
    REQUEST,
    check_disk_space,
    check_output,
    partial_name,
    whole_or_nothing,
)
from modulora_core.errors import DiskSpaceError, OutputError


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), whole_or_nothing(out) as folder:
        (folder / "half").write_text("x")
        (folder / "deep").mkdir()
        assert not out.exists()
        raise RuntimeError
    assert not out.exists()
    assert partial_name(out).is_dir()
    with whole_or_nothing(out) as folder:
        assert [p.name for p in folder.iterdir()] == [MARKER], (
            "without resume what nobody can go on with is dropped"
        )
        (folder / "whole").write_text("x")
    assert [p.name for p in out.iterdir()] == ["whole"]
    assert not partial_name(out).exists()


def test_resume_finds_the_unfinished_work(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_or_nothing(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    with whole_or_nothing(tmp_path / "out", resume=True) as folder:
        assert (folder / "half").read_text() == "x"
    assert (tmp_path / "out" / "half").exists()
    assert not (tmp_path / "out" / MARKER).exists()


def test_work_that_can_be_gone_on_with_is_never_dropped(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_or_nothing(tmp_path / "out") as folder:
        (folder / REQUEST).write_text("{}")
        raise RuntimeError
    refusal = (
        r"out\.partial: .*unfinished run of quantize; go on with it with --resume, or remove it"
    )
    with pytest.raises(OutputError, match=refusal), whole_or_nothing(tmp_path / "out"):
        pass
    with pytest.raises(OutputError, match=refusal):
        check_output(tmp_path / "out")
    check_output(tmp_path / "out", resume=True)
    assert (folder / REQUEST).read_text() == "{}"


@pytest.mark.parametrize("resume", [False, True])
def test_what_another_run_writes_at_the_moment_is_left_alone(tmp_path: Path, resume: bool) -> None:
    pytest.importorskip("fcntl")
    with whole_or_nothing(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        with pytest.raises(OutputError, match="another run is writing it; wait"):
            check_output(tmp_path / "out", resume=resume)
        with (
            pytest.raises(OutputError, match="another run is writing it; wait"),
            whole_or_nothing(tmp_path / "out", resume=resume),
        ):
            pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["half"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_or_nothing(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "out" / "whole").exists()


def test_something_else_at_the_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"found 1 entries \(mine\)"):
        check_output(tmp_path / "folder")
    with pytest.raises(OutputError, match="found a file"):
        check_output(tmp_path / "file")
    assert (tmp_path / "folder" / "mine").read_text() == "x"


def test_a_foreign_folder_under_the_temporary_name_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    with pytest.raises(OutputError, match=r"out\.partial"), whole_or_nothing(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial" / "mine").exists()


def test_work_killed_before_its_folder_was_marked_may_begin_again(tmp_path: Path) -> None:
    partial_name(tmp_path / "out").mkdir()
    with whole_or_nothing(tmp_path / "out", resume=True) as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_work_killed_before_its_folder_was_renamed_may_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException): ...

    def killed(*_: object) -> None:
        raise Killed

    with (
        monkeypatch.context() as patch,
        pytest.raises(Killed),
        whole_or_nothing(tmp_path / "out") as folder,
    ):
        (folder / "a").write_text("1")
        patch.setattr(Path, "replace", killed)
    with whole_or_nothing(tmp_path / "out", resume=True) as folder:
        assert (folder / "a").read_text() == "1"


def test_too_little_disk_space_is_refused_with_both_sizes(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "new" / "out", 1)
    with pytest.raises(DiskSpaceError, match=r"MiB would be written, [\d,]+ MiB are free"):
        check_disk_space(tmp_path / "new" / "out", 2**62)
