"""The words of a run: in a badge, in the terminal, and what stands against a certificate."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from modulora_conformance.report import table_text, write_report
from modulora_conformance.report.reading import Measured, read, read_file
from modulora_conformance.report.verdict import against, levels_passed, verdict
from modulora_conformance.results import Outcome

from modulora_core.errors import DataError

SVG = "{http://www.w3.org/2000/svg}"


def one(level: str, kind: Any, reason: str = "") -> Outcome:
    return Outcome(level, "test_it", "", "defaults", kind, reason, 0.1)


@pytest.mark.parametrize(
    ("outcomes", "complete", "state", "words"),
    [
        ([one("L0", "passed"), one("L1", "passed")], True, "certified", "certified "),
        ([one("L0", "passed"), one("L1", "passed")], False, "passed", "L0-L1 passed"),
        (
            [one("L0", "passed"), one("L1", "skipped", "missing hardware: no GPU")],
            True,
            "certified",
            "certified ",
        ),
        ([one("L0", "passed"), one("L1", "skipped", "no time")], True, "passed", "L0 passed"),
        ([one("L0", "passed"), one("L1", "xfailed", "why")], True, "passed", "L0 passed"),
        ([one("L0", "xfailed", "why"), one("L1", "passed")], True, "incomplete", "not certified"),
        ([one("L1", "passed")], False, "incomplete", "not certified"),
        ([one("L0", "passed"), one("L1", "failed")], True, "failing", "failing"),
        ([one("L0", "failed"), one("L1", "blocked")], True, "failing", "failing"),
    ],
)
def test_a_badge_says_no_more_than_the_run_found(
    make: Any, tmp_path: Path, outcomes: list[Outcome], complete: bool, state: str, words: str
) -> None:
    result = make(outcomes, complete=complete)
    found = verdict(read(result))
    assert found.state == state
    assert found.words.startswith(words)
    write_report(result, tmp_path)
    svg = ET.fromstring((tmp_path / "mine.svg").read_text("utf-8"))
    assert [text.text for text in svg.iter(f"{SVG}text")] == ["modulora conformance", found.words]
    rectangles = [int(r.attrib["width"]) for r in svg.iter(f"{SVG}rect")]
    assert rectangles[0] == sum(rectangles[1:]) == int(svg.attrib["width"])


def test_a_gap_ends_the_levels_that_passed(make: Any) -> None:
    run = read(make([one("L0", "passed"), one("L1", "passed"), one("L3", "passed")]))
    assert levels_passed(run.checks) == "L0-L1"


def test_one_sentence_names_all_that_stands_against_a_certificate(
    broken: dict[str, Any], make: Any
) -> None:
    broken["complete"] = False
    sentence = against(read(broken))
    assert sentence.startswith("Not certified: the run didn't cover every level")
    for part in (
        "2 checks failed",
        "1 check held back",
        "1 check failed as expected",
        "I didn't feel like it",
    ):
        assert part in sentence
    assert "no CUDA device" not in sentence
    assert against(read(make())).startswith("Certified: every check of suite ")


def test_certified_is_said_only_where_it_was_asked_for(make: Any) -> None:
    result = make(asked=False)
    assert result["certified"] is False
    assert verdict(read(result)).words == "L0-L7 passed"
    assert against(read(result)).startswith("Passed: every check of suite ")
    assert "ertified:" not in table_text(result)
    assert "Certified:" in table_text(make())
    assert against(read(make(complete=False, asked=False))).startswith(
        "Not certified: the run didn't cover"
    )


def test_a_run_without_golden_vectors_says_so(make: Any) -> None:
    assert "No golden vectors were held" in table_text(make())
    golden = (
        one("L1", "passed"),
        Outcome("L1", "test_tiles_give_the_golden_vectors", "", "defaults", "passed", "", 0.1),
    )
    assert "No golden vectors" not in table_text(make(list(golden)))
    assert "No golden vectors" not in table_text(make([one("L0", "passed")]))


def test_the_terminal_is_told_every_failure_and_every_reason_of_a_skip(
    broken: dict[str, Any],
) -> None:
    text = table_text(broken, 100)
    for check in broken["checks"]:
        if check["outcome"] == "failed":
            (line,) = [
                line
                for line in text.splitlines()
                if line.startswith(f"FAILED {check['level']} {check['check']}")
            ]
            assert " ".join(check["reason"].split()) in line
        if check["outcome"] == "skipped":
            assert check["reason"] in text
    assert "SKIPPED 2: missing hardware: no CUDA device" in text
    assert "modulora conformance mine --seed 1234" in " ".join(text.split())
    assert "\x1b" not in text
    assert "\x1b[" in table_text(broken, 100, color=True)


def test_the_table_has_a_row_for_each_level_with_its_counts(broken: dict[str, Any]) -> None:
    rows = {
        line.split()[0]: line
        for line in table_text(broken, 120).splitlines()
        if line.startswith("L")
    }
    assert rows.keys() == broken["levels"].keys()
    for level, counts in broken["levels"].items():
        cells = rows[level].removeprefix(f"{level}     title of {level}").split()
        assert cells[:5] == [str(n) if n else "-" for n in counts.values()]


def test_a_share_of_nothing_is_zero_only_for_zero() -> None:
    assert Measured(name="a", value=0.0, limit=0.0, unit="relative").share == 0
    assert Measured(name="a", value=1e-9, limit=0.0, unit="relative").share == float("inf")
    assert Measured.model_validate(
        {"name": "a", "value": None, "limit": 1.0, "unit": "relative"}
    ).share == float("inf")
    assert Measured(name="a", value=3.0, limit=4.0, unit="relative").share == 0.75


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"quantizer": "../../elsewhere"}, "quantizer"),
        ({"levels": {"L0' onload='": {"passed": 1}}}, "levels"),
        ({"checks": [{"level": "L0"}]}, "checks"),
        ({"configurations": []}, "aren't listed"),
        ({"certified": None}, "certified"),
    ],
)
def test_json_of_something_else_is_refused_by_its_field(
    make: Any, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        write_report(make() | change, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(DataError, match=r"a\.json"):
        read_file(tmp_path / "a.json")
