"""The support tables in Markdown, and the page that is committed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from modulora_conformance.report import write_report
from modulora_conformance.report.support import main

HEADINGS = "quantizer, options, bits per weight, error, Gaussian weights, levels passed, certified, suite, protocol"


@pytest.fixture
def results(make: Any, tmp_path: Path) -> Path:
    for name in ("mine", "another"):
        write_report(make(quantizer=name), tmp_path / "results")
    return tmp_path / "results"


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_row_says_what_was_measured_of_a_configuration(make: Any, tmp_path: Path) -> None:
    result = make()
    write_report(result, tmp_path)
    headings, _, *found = rows((tmp_path / "mine.md").read_text("utf-8"))
    assert headings == re.split(r", (?!Gaussian)", HEADINGS)
    assert found == [
        ["mine 1.0", name, "4.5", "0.095", "L0–L7", "yes", result["suite"], "1"]
        for name in result["configurations"]
    ]


def test_words_of_a_plugin_stay_in_their_cell(broken: dict[str, Any], tmp_path: Path) -> None:
    write_report(broken, tmp_path)
    text = (tmp_path / "mine.md").read_text("utf-8")
    assert {len(row) for row in rows(text)} == {8}
    assert len(rows(text)) == 2 + len(broken["configurations"])
    assert not re.search(r"(?<!\\)<", text)


def test_the_text_is_the_same_on_another_machine(make: Any, tmp_path: Path) -> None:
    texts = set()
    for seconds, error, seed in ((0.1, 0.09531, "1"), (7.0, 0.09529, "2")):
        result = make(seed=seed, speed={}, environment={"processor": seed})
        for check in result["checks"]:
            check["seconds"] = seconds
            for found in check["measurements"]:
                if found["name"] == "error of gaussian weights":
                    found["value"] = error
        write_report(result, tmp_path)
        texts.add((tmp_path / "mine.md").read_text("utf-8"))
    assert len(texts) == 1


def test_a_written_page_passes_its_check_and_lists_every_configuration(
    results: Path, tmp_path: Path
) -> None:
    page = tmp_path / "docs" / "support.md"
    assert main([str(results), "--write", str(page)]) == 0
    assert main([str(results), "--check", str(page)]) == 0
    assert [row[0] for row in rows(page.read_text("utf-8"))[2:]] == [
        "another 1.0",
        "another 1.0",
        "mine 1.0",
        "mine 1.0",
    ]


@pytest.mark.parametrize("how", ["edited", "missing"])
def test_a_page_that_differs_fails_with_the_command_that_mends_it(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    page = tmp_path / "support.md"
    if how == "edited":
        assert main([str(results), "--write", str(page)]) == 0
        page.write_text(page.read_text("utf-8").replace("4.5", "2.5"), "utf-8")
    assert main([str(results), "--check", str(page)]) == 1
    assert (
        f"python -m modulora_conformance.report.support {results} --write {page}"
        in capsys.readouterr().err
    )


def test_results_of_a_part_are_refused_for_writing_and_left_out_of_a_check(
    results: Path, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "support.md"
    assert main([str(results), "--write", str(page)]) == 0
    write_report(make(quantizer="third", complete=False), results)
    before = page.read_text("utf-8")
    assert main([str(results), "--write", str(page)]) == 2
    assert "third" in capsys.readouterr().err
    assert page.read_text("utf-8") == before
    assert main([str(results), "--check", str(page)]) == 0
    assert "third.json" in capsys.readouterr().err


def test_a_folder_without_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--write", str(tmp_path / "support.md")]) == 2
    assert not (tmp_path / "support.md").exists()
    assert "--report" in capsys.readouterr().err
