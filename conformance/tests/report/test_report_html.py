from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from modulora_conformance.report import write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}

LOADING = {"src", "srcset", "data", "poster", "action", "formaction", "background", "ping"}
"""Attributes by which a page fetches something."""


class Page(HTMLParser):
    """What is in a page: tags in balance, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1] == "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(result: dict[str, Any], folder: Path) -> tuple[str, Page]:
    write_report(result, folder)
    text = (folder / f"{result['quantizer']}.html").read_text("utf-8")
    return text, Page(text)


@pytest.mark.parametrize("which", ["certified", "broken"])
def test_a_page_is_well_formed_and_names_every_check(
    which: str, make: Any, broken: dict[str, Any], tmp_path: Path
) -> None:
    result = make() if which == "certified" else broken
    _, page = written(result, tmp_path)
    for check in result["checks"]:
        assert check["check"] in page.text
        assert check["check"].removeprefix("test_").replace("_", " ") in page.text
        assert " ".join(check["reason"].split()) in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(result["levels"]) <= set(ids)
    targets = {
        str(attributes["href"]).removeprefix("#")
        for _, attributes in page.tags
        if "href" in attributes
    }
    assert targets <= set(ids)


def test_a_page_loads_nothing_and_runs_nothing(broken: dict[str, Any], tmp_path: Path) -> None:
    text, page = written(broken, tmp_path)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    for _, attributes in page.tags:
        assert not LOADING & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
        assert str(attributes.get("href", "#")).startswith("#")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    policies = [
        a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_text_is_shown_as_it_is(broken: dict[str, Any], tmp_path: Path) -> None:
    _, page = written(broken, tmp_path)
    hostile = " ".join(broken["distribution"].split())
    # in a reason, a configuration, the distribution, the environment's names and values, and a measurement
    assert page.text.count(hostile) >= 6


def test_a_failure_tells_what_it_means_and_what_was_measured(
    broken: dict[str, Any], tmp_path: Path
) -> None:
    _, page = written(broken, tmp_path)
    assert "If this fails: look at test_the_two_directions_are_adjoint" in re.sub(
        r" +", " ", page.text
    )
    assert "difference of the directions: 0.03, at most 2e-06" in page.text
    assert "1 more check was held back" in page.text
    assert "other: not finite, at most 1" in page.text


def test_errors_lie_on_the_side_of_the_limit_where_they_belong(
    broken: dict[str, Any], tmp_path: Path
) -> None:
    _, page = written(broken, tmp_path)
    uses = [a for tag, a in page.tags if tag == "use" and str(a.get("x", "")).endswith("%")]
    limits = {str(a["x1"]) for tag, a in page.tags if tag == "line" and a.get("class") == "limit"}
    errors = [
        m for check in broken["checks"] for m in check["measurements"] if m["unit"] == "relative"
    ]
    assert len(uses) == len(errors) + len(broken["speed"]["defaults"]["timings"])
    assert all(0 <= float(str(a["x"]).removesuffix("%")) <= 100 for a in uses)
    rows = re.findall(
        r'aria-label="([^"]*) of the tolerance">(.*?)</svg>',
        (tmp_path / "mine.html").read_text("utf-8"),
        re.DOTALL,
    )
    for label, row in rows:
        (limit,) = re.findall(r'class="limit" x1="([\d.]+)%"', row)
        dots = [float(x) for x in re.findall(r'<use href="#m\d" x="([\d.]+)%"', row)]
        beyond = label.endswith(("×", "not finite"))
        assert (max(dots) > float(limit)) == beyond, label
    assert limits


def test_a_saved_result_makes_the_same_reports_again(
    broken: dict[str, Any], tmp_path: Path
) -> None:
    write_report(broken, tmp_path / "first")
    folders = str(tmp_path / "first" / "mine.json"), str(tmp_path / "again")
    command = [sys.executable, "-m", "modulora_conformance.report", *folders]
    assert (
        subprocess.run(command, capture_output=True, check=True, text=True)
        .stdout.strip()
        .endswith("mine.html")
    )
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_what_is_not_finite_is_null_in_the_file_and_over_its_limit(
    broken: dict[str, Any], tmp_path: Path
) -> None:
    write_report(broken, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    result = json.loads((tmp_path / "mine.json").read_text(), parse_constant=refuse)
    values = [m["value"] for check in result["checks"] for m in check["measurements"]]
    assert None in values
