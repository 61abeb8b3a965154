"""Reports of runs that never took place: page, badge, tables, terminal, JSON."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from modulora_conformance.report import write_report
from modulora_conformance.report.support import HEADINGS, main
from modulora_conformance.report.terminal import summary_text
from modulora_conformance.report.verdict import against, rows, verdict
from modulora_conformance.results import (
    HARDWARE,
    Branch,
    Branches,
    Measurement,
    Measurements,
    Outcome,
    Run,
    read_file,
)

BRANCH = Branch(name="mine:f: if a: -> b", file="mine.py", line=7, source="if a:", reason="why")

CONFIGURATIONS = ("defaults", "bits=2, group_size=64")

ALL = "100 % of 19 branches, 1 explained"

HOSTILE = "<script src='https://example.org/x.js'>alert(1)</script>\" onload=\"x | `y` & \n**z**"
"""Text that a plugin might give as a reason, a name or an option."""


def outcome(level, check="it", kind="passed", configuration="defaults", reason="", measured=()):
    """``measured`` has tuples of a name, a value, a limit and a unit."""
    fields = ("name", "value", "limit", "unit")
    return Outcome(
        level=level,
        check=f"test_{check}",
        configuration=configuration,
        outcome=kind,
        reason=reason,
        seconds=0.0123,
        measurements=[Measurement(**dict(zip(fields, m, strict=True))) for m in measured],
    )


def passing(configuration="defaults"):
    """A run that can be certified."""
    measured = {
        "L1": [
            ("bits per weight", 4.5, 4.5, "bits"),
            ("error of gaussian weights", 0.0953, 0.1, "relative"),
        ],
        "L3": [("product", 4e-7, 2e-6, "relative")],
        "L5": [("peak of forward", 1.2e6, 2**21, "bytes")],
    }
    found = [
        outcome(
            f"L{n}", f"check_{n}", configuration=configuration, measured=measured.get(f"L{n}", ())
        )
        for n in range(10)
    ]
    reason = f"{HARDWARE}no CUDA device"
    return [*found, outcome("L7", "cuda", "skipped", configuration, reason)]


def make(checks=None, **fields):
    if checks is None:
        checks = [check for name in CONFIGURATIONS for check in passing(name)]
    timing = {"name": "x", "seconds": 2e-5, "dense_seconds": 6e-5, "bytes": 0, "noise": 1.1}
    known = {
        "quantizer": "mine",
        "suite": "2026.11",
        "protocol": 2,
        "distribution": "modulora-mine",
        "version": "1.0",
        "certified": True,
        "complete": True,
        "checks": checks,
        "branches": Branches(total=20, explained=(BRANCH,)),
        "seed": "1234",
        "environment": {"python": "3.11", "accelerators": [], "packages": {"numba": None}},
        "about": {f"L{n}": {"title": f"title of L{n}", "text": "About."} for n in range(10)},
        "meanings": {c.check: f"If this fails: look at `{c.check}`." for c in checks},
        "speed": {"defaults": {"shape": (1024, 512), "threads": 2, "timings": [timing]}},
    }
    return Run(**(known | fields))


@pytest.fixture
def broken():
    """A run with every outcome, and with words that try to be markup."""
    second = CONFIGURATIONS[1]
    adjoint = [
        ("difference of the directions", 0.03, 2e-6, "relative"),
        ("other", float("inf"), 1.0, "relative"),
    ]
    kept = [(f"kept {HOSTILE}", 8e6, 2e6, "bytes")]
    blocked = "test_adjoint failed before"
    checks = [
        *passing("defaults"),
        *passing(second),
        outcome("L3", "adjoint", "failed", second, f"error 3e-2: {HOSTILE}", adjoint),
        outcome("L5", "nothing_is_kept", "failed", second, "kept 8 MiB", kept),
        outcome("L4", "a_check_that_needs_it", "blocked", second, blocked),
        outcome("L6", "an_older_format_is_read", "xfailed", HOSTILE, "not yet"),
        outcome("L6", "something_else", "skipped", second, "I didn't feel like it"),
    ]
    environment = {HOSTILE: [HOSTILE], "packages": {"torch": HOSTILE}}
    return make(checks, certified=False, distribution=HOSTILE, environment=environment)


class Page(HTMLParser):
    """The tags, attributes and words of a page, whose tags must be balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def written(run, folder):
    write_report(run, folder)
    return Page((folder / "mine.html").read_text("utf-8"))


def test_a_page_names_every_check_its_meaning_and_its_measurements(broken, tmp_path):
    text = written(broken, tmp_path).text
    for check in broken.checks:
        assert check.check in text
        assert " ".join(check.reason.split()) in text
    assert "If this fails: look at test_adjoint" in re.sub(" +", " ", text)
    assert "difference of the directions: 0.03, at most 2e-06 – over the limit" in text
    assert "other: not finite, at most 1" in text
    assert "Checks blocked by these failures: 1." in text
    assert "20 µs 60 µs 3" in text
    assert text.count(" ".join(HOSTILE.split())) >= 6  # shown, and never markup


def test_a_page_loads_nothing_and_runs_nothing(broken, tmp_path):
    page = written(broken, tmp_path)
    loading = {"src", "srcset", "data", "poster", "action", "background", "ping"}
    active = {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    assert not active & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not loading & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert str(attributes.get("href", "#")).startswith("#")
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    style = (tmp_path / "mine.html").read_text("utf-8").partition("<style>")[2]
    assert not re.search(r"url\(|@import", style)


def test_saved_json_is_read_as_the_same_run(broken, tmp_path):
    write_report(broken, tmp_path)
    text = (tmp_path / "mine.json").read_text()
    assert not re.search("Infinity|NaN", text)
    again = read_file(tmp_path / "mine.json")
    assert again.model_dump_json() == broken.model_dump_json()
    write_report(again, tmp_path / "again")
    assert (tmp_path / "again" / "mine.html").read_text() == (tmp_path / "mine.html").read_text()


@pytest.mark.parametrize(
    ("checks", "complete", "state", "words"),
    [
        ([outcome("L0"), outcome("L1")], True, "certified", "certified 2026.11, 2 checks, " + ALL),
        ([outcome("L0"), outcome("L1")], False, "passed", "L0-L1 passed"),
        ([outcome("L0"), outcome("L1", kind="skipped")], True, "passed", "L0 passed"),
        ([outcome("L0"), outcome("L1", kind="xfailed")], True, "passed", "L0 passed"),
        ([outcome("L0"), outcome("L1"), outcome("L3")], False, "passed", "L0-L1 passed"),
        ([outcome("L1")], False, "incomplete", "not certified"),
        ([outcome("L0", kind="failed"), outcome("L1", kind="blocked")], True, "failing", "failing"),
    ],
)
def test_a_badge_says_no_more_than_the_run_found(tmp_path, checks, complete, state, words):
    run = make(checks, complete=complete, certified=False)
    run = run.model_copy(update={"certified": run.sound})
    assert verdict(run) == (state, words)
    write_report(run, tmp_path)
    svg = ET.fromstring((tmp_path / "mine.svg").read_text("utf-8"))
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["modulora conformance", words]


def test_a_device_that_no_check_ran_on_is_named_everywhere(tmp_path):
    checks = [outcome("L0"), outcome("L7"), *passing()]
    ran = outcome("L7", "cuda_gives_the_tiles_of_the_cpu")
    assert make(checks, devices=("cpu",)).untested == ()
    assert make([*checks, ran], devices=("cpu", "cuda")).untested == ()
    run = make(checks, devices=("cpu", "cuda"))
    assert run.untested == ("cuda",)
    assert verdict(run).words == f"certified without hardware 2026.11, 12 checks, {ALL}"
    assert against(run).startswith("Certified without hardware: ")
    assert against(run).endswith("Nothing ran on cuda, which the spec names.")
    write_report(run, tmp_path)
    for suffix in ("svg", "html", "md"):
        assert "certified without hardware" in (tmp_path / f"mine.{suffix}").read_text().lower()
    row = cells_of((tmp_path / "mine.md").read_text())[-1]
    assert row[7:] == ["without hardware (2026.11, 2)"]
    uncertified = run.model_copy(update={"certified": False})
    assert verdict(uncertified).words == "L0-L9 passed without hardware"


def test_the_terminal_has_a_row_for_each_level_every_failure_and_every_skip(broken):
    text = summary_text(broken, 120)
    found = {line.split()[0]: line for line in text.splitlines() if line.startswith("L")}
    assert found.keys() == broken.levels.keys()
    for level, counts in broken.levels.items():
        cells = found[level].partition(f"title of {level}")[2].split()
        assert cells[:5] == [str(n) if n else "-" for n in counts.values()]
    first, *others = text.splitlines()
    assert first == against(broken)
    for check in broken.failures:
        assert sum(f"FAILED {check.level} {check.check}" in line for line in others) == 1
        assert sum(" ".join(check.reason.split()) in line for line in others) == 1
    assert "FAILED" not in summary_text(broken, failures=False)
    assert "SKIPPED 2: missing hardware: no CUDA device" in text
    assert "modulora conformance mine --seed 1234" in text
    assert "No golden vectors" in text
    assert "\x1b" not in text
    assert "\x1b[" in summary_text(broken, color=True)
    golden = outcome("L1", "tiles_give_the_golden_vectors")
    assert "No golden vectors" not in summary_text(make([golden]))


def cells_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_support_table_has_a_row_for_each_configuration_and_no_markup(broken, tmp_path):
    write_report(make(), tmp_path)
    headings, _, *found = cells_of((tmp_path / "mine.md").read_text("utf-8"))
    assert headings == list(HEADINGS)
    expected = [
        "4.5",
        "0.095",
        "-",
        "whole",
        "100 % of 19 branches, 1 explained",
        "yes (2026.11, 2)",
    ]
    assert found == [["mine 1.0", name, *expected] for name in CONFIGURATIONS]
    write_report(broken, tmp_path)
    text = (tmp_path / "mine.md").read_text("utf-8")
    assert {len(row) for row in cells_of(text)} == {len(HEADINGS)}
    assert len(cells_of(text)) == 2 + len(rows(broken))
    assert not re.search(r"(?<!\\)<", text)


def test_a_support_table_says_how_a_quantizer_is_served():
    parts = [
        outcome("L8", "a_sliced_weight_is_its_part").model_copy(update={"case": case})
        for case in "01"
    ]
    recorded = outcome("L8", "a_product_can_be_recorded_in_a_graph")
    failed = outcome("L8", "batches_of_a_server_are_multiplied", "failed")

    def served(*checks):
        return rows(make([*passing(), *checks]))[0].serves

    assert served(*parts, recorded) == "rows, columns, graphs"
    assert served(parts[0]) == "rows"
    assert served(recorded) == "whole, graphs"
    assert served(*parts, failed) == "no"
    assert rows(make([outcome("L0")]))[0].serves == "-"


def test_a_written_page_passes_its_check_until_it_differs(tmp_path, capsys):
    results, page = tmp_path / "results", tmp_path / "docs" / "support.md"
    for name in ("mine", "another"):
        write_report(make(quantizer=name), results)
    words = [str(results), "--check", str(page)]
    mend = f"python -m modulora_conformance.report.support {results} --write {page}"
    assert main(words) == 1
    assert mend in capsys.readouterr().err
    assert main(mend.split()[3:]) == 0
    assert [row[0] for row in cells_of(page.read_text())[2:]] == [
        "another 1.0",
        "another 1.0",
        "mine 1.0",
        "mine 1.0",
    ]
    # seconds, seeds and machines do not change the page
    write_report(make(seed="2", speed={}, environment={"processor": "other"}), results)
    assert main(words) == 0
    # a run that counts no branches leaves what the page says of them
    counted = make(quantizer="mine", branches=Branches(total=4, explained=(BRANCH,)))
    write_report(counted, results)
    assert main(words) == 1
    assert main(mend.split()[3:]) == 0
    assert "100 % of 3 branches, 1 explained" in page.read_text()
    write_report(make(quantizer="mine", branches=None), results)
    assert main(words) == 0
    page.write_text(page.read_text().replace("4.5", "2.5"))
    assert main(words) == 1


def test_a_branch_that_no_check_ran_is_named_everywhere_and_certifies_nothing(tmp_path):
    other = BRANCH.model_copy(update={"name": HOSTILE, "reason": "", "line": 12345})
    for found in (Branches(total=4, missing=(other,)), Branches(total=4, stale=(HOSTILE,))):
        run = make(branches=found, certified=False)
        assert not run.sound
        assert verdict(run).state == "passed"
        assert against(run).startswith("Passed, not certified: ")
    run = make(branches=Branches(total=4, missing=(other,), stale=(HOSTILE,)), certified=False)
    assert "75 % of 4 branches" in summary_text(run)
    words = " ".join(HOSTILE.split())
    for text in (written(run, tmp_path).text, " ".join(summary_text(run).split())):
        assert "12345" in text
        assert text.count(words) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measurement_that_is_not_finite_says_so(value):
    with pytest.raises(AssertionError, match=r"at most 0\.5, got NaN or Inf"):
        Measurements().at_most("error", value, 0.5)
