"""One self-contained HTML page of a run: no script, nothing from elsewhere, for a screen of any width and for paper.

The words in it come from plugins, and from files that anybody may send: the template escapes all of them, and its policy
(Content-Security-Policy) lets a browser load nothing at all. Jinja comes with torch, which depends on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from modulora_conformance.report import numbers, plots
from modulora_conformance.report.markdown import ERROR, SIZE
from modulora_conformance.report.reading import Check, Run
from modulora_conformance.report.verdict import against, level_state, levels_passed, repeat, verdict
from modulora_conformance.results import Kind

_FOLDER = Path(__file__).parent

_CODE = re.compile(r"``?([^`]+)``?")

SIGNS = {"passed": "✓", "failed": "✕", "blocked": "⊘", "skipped": "–", "xfailed": "≈"}
"""Beside the word, never instead of it."""

NOISY = 2.0

WORDS = {"xfailed": "expected failure"}


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one check, over configurations and cases."""

    name: str
    sentence: str
    meaning: str
    checks: tuple[Check, ...]

    @property
    def state(self) -> Kind:
        """The worst outcome."""
        return level_state(self.checks)

    @property
    def outcomes(self) -> Counter[str]:
        """How often each outcome."""
        return Counter(check.outcome for check in self.checks)

    @property
    def seconds(self) -> float:
        """All of them together."""
        return sum(check.seconds for check in self.checks)

    @property
    def worst(self) -> str:
        """The largest share of a tolerance; empty where nothing was measured against one."""
        shares = [found.share for check in self.checks for found in check.errors]
        return numbers.share_text(max(shares)) if shares else ""

    def only(self, outcome: str) -> Iterator[Check]:
        """Those with an outcome."""
        return (check for check in self.checks if check.outcome == outcome)


@dataclass(frozen=True, slots=True)
class LevelView:
    """A level with its checks."""

    name: str
    title: str
    paragraphs: tuple[str, ...]
    state: Kind
    groups: tuple[Group, ...]

    @property
    def outcomes(self) -> Counter[str]:
        """How often each outcome."""
        return sum((group.outcomes for group in self.groups), Counter())


def page(run: Run) -> str:
    """The page's text."""
    levels = tuple(_level(run, name) for name in sorted(run.levels))
    return _template().render(
        run=run, verdict=verdict(run), against=against(run), repeat=repeat(run), levels=levels, signs=SIGNS, words=WORDS,
        failures=[(level, group) for level in levels for group in level.groups if group.outcomes["failed"]],
        configurations=[_configuration(run, name) for name in run.configurations], markers=plots.markers(run),
        noise=_noise(run), errors=plots.error_plot(run), memory=plots.memory_bars(run), speed=plots.speed_plot(run),
        environment=list(_flat(run.environment)), n=numbers, style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
    )  # fmt: skip


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    return environment.get_template("page.html.jinja")


def _prose(docstring: str) -> Markup:
    """Text of a docstring, escaped, with what is between backticks as code."""
    pieces = _CODE.split(docstring)  # every other one was between backticks
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if i % 2 else piece
        for i, piece in enumerate(pieces)
    )


def _level(run: Run, name: str) -> LevelView:
    checks: dict[str, list[Check]] = {}
    for check in run.of(name):
        checks.setdefault(check.check, []).append(check)
    groups = tuple(
        Group(key, found[0].sentence, run.meanings.get(key, ""), tuple(found))
        for key, found in checks.items()
    )
    text = run.about[name].text if name in run.about else ""
    return LevelView(
        name, run.title(name), tuple(text.splitlines()), level_state(run.of(name)), groups
    )


def _configuration(run: Run, name: str) -> dict[str, Any]:
    """A row of the table of configurations."""
    checks = [check for check in run.checks if check.configuration == name]
    size = [found for _, found in run.measured("bits", name) if found.name == SIZE]
    error = [found for _, found in run.measured("relative", name) if found.name == ERROR]
    return {
        "name": name,
        "size": f"{size[0].value:.4g}" if size else "",
        "promise": f"{size[0].limit:.4g}" if size else "",
        "error": f"{error[0].value:.2g}" if error else "",
        "levels": levels_passed(checks).replace("-", "–") or "none",
        "outcomes": Counter(check.outcome for check in checks),
    }


def _noise(run: Run) -> float:
    """How many times its best a median of the speed was, where that is so much that the speed says little; else 0."""
    worst = max(
        (timing.noise for speed in run.speed.values() for timing in speed.timings), default=0.0
    )
    return worst if worst > NOISY else 0.0


def _flat(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of the environment, those of packages too."""
    for name, value in environment.items():
        if isinstance(value, Mapping):
            yield from (
                (str(key), "not installed" if item is None else str(item))
                for key, item in value.items()
            )
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(map(str, value)) or "none"
        else:
            yield name, str(value)
