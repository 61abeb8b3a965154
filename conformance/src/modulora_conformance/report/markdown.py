"""The support table in Markdown: text that is the same whenever the same things hold, so that it can be committed.

No seconds, no date, no machine; errors to two digits, which rounding in another order doesn't change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from modulora_conformance.report.reading import Run
from modulora_conformance.report.verdict import against, levels_passed, verdict

HEADINGS = (
    "quantizer",
    "options",
    "bits per weight",
    "error, Gaussian weights",
    "levels passed",
    "certified",
    "suite",
    "protocol",
)

SIZE, ERROR = "bits per weight", "error of gaussian weights"
"""Names of measurements of level L1."""

_SPECIAL = re.compile(r"([\\`*\[\]<>|&])")


def support_table(runs: Sequence[Run]) -> str:
    """A badge for each run, a table with a row for each configuration, and what stands against a certificate where something does."""
    badges = [f"![modulora conformance: {verdict(run).words}]({run.quantizer}.svg)" for run in runs]
    return "\n".join(
        [
            *badges,
            "",
            *table(runs),
            *(f"\n{escape(against(run))}" for run in runs if not run.certified),
            "",
        ]
    )


def table(runs: Iterable[Run]) -> Iterator[str]:
    """The lines of the table."""
    yield _row(HEADINGS)
    yield _row(["---"] * len(HEADINGS))
    for run in runs:
        for configuration in run.configurations:
            levels = levels_passed(
                check for check in run.checks if check.configuration == configuration
            )
            yield _row([
                f"{run.quantizer} {run.version}".strip(),
                configuration,
                _measured(run, configuration, "bits", SIZE, ".4g"),
                _measured(run, configuration, "relative", ERROR, ".2g"),
                levels.replace("-", "–") or "none",
                "yes" if run.certified else "no",
                run.suite,
                str(run.protocol),
            ])  # fmt: skip


def escape(text: str) -> str:
    """Text as Markdown shows it, on one line: what a plugin says of itself makes no markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(escape(cell) if cell != '---' else cell for cell in cells)} |"


def _measured(run: Run, configuration: str, unit: str, name: str, digits: str) -> str:
    values = [found.value for _, found in run.measured(unit, configuration) if found.name == name]
    return format(max(values), digits) if values else "-"
