"""Adds the kit to pytest: command-line options, fixtures, and the recorder of outcomes.

Every run of pytest imports this module if the kit is installed, so it imports no torch.
"""

from __future__ import annotations

import datetime
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modulora_conformance import SUITE
from modulora_conformance.items import golden_of
from modulora_conformance.levels import HIGHEST
from modulora_conformance.recorder import MEASUREMENTS, Recorder, origin_of
from modulora_conformance.results import Measurements


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("modulora-conformance", "ModuLoRA conformance kit")
    add = group.addoption
    add("--quantizer", metavar="NAME", help="a quantizer of `modulora list-quantizers`")
    add("--quantizer-option", metavar="KEY=VALUE", action="append", default=[],
        help="set an option of the quantizer; repeatable")  # fmt: skip
    add("--conformance-level", metavar="N", type=int, choices=range(HIGHEST + 1), default=HIGHEST,
        help="run the levels 0 to N")  # fmt: skip
    add("--certified", action="store_true",
        help="fail too for expected failures, and for skips other than hardware's")  # fmt: skip
    add("--branches", action="store_true",
        help="count the branches of the plugin's source; a certificate then needs all")  # fmt: skip
    add("--quick", action="store_true",
        help="leave out named and drawn sizes; certifies nothing")  # fmt: skip
    add("--conformance-report", metavar="DIR", type=Path, help="write reports to DIR")
    add("--golden", metavar="DIR", type=Path, help="compare with the golden vectors in DIR")


def _seed_of_today(quantizer: str | None) -> str:
    """A seed that is another one each day, and for each version of the quantizer's plugin."""
    origin = origin_of(quantizer) if quantizer is not None else ""
    return str(zlib.crc32(f"{origin} {datetime.date.today()}".encode()))


@dataclass(frozen=True, slots=True)
class Configuration:
    """A quantizer's name and options: one run of all the checks."""

    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        from modulora_core.spec import titled

        return titled(self.options)


CONFIGURATIONS = pytest.StashKey[list[Configuration]]()


def configurations(name: str, options: list[str]) -> list[Configuration]:
    """The given options (``key=value``), or every set of options that the spec promises.

    Raises:
        PluginError: the quantizer is not installed, or its plugin is broken.
        OptionError: an option is malformed.
    """
    from modulora_core.options import parse_options
    from modulora_core.registry import find

    entry = find(name)
    promises = entry.spec.promises if entry.spec is not None else ()
    chosen = [parse_options(options)] if options else [promise.options for promise in promises]
    return [Configuration(name, found) for found in chosen or [{}]]


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its seed
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = _seed_of_today(config.getoption("--quantizer"))
    config.addinivalue_line("markers", "slow: compiles for many seconds")
    config.addinivalue_line("markers", "instrument: --quick leaves it out")
    config.addinivalue_line("markers", "threads: runs a check of the kit on all threads")
    _check_distribution(config)
    if config.getoption("--quick") and config.getoption("--certified"):
        raise pytest.UsageError("--certified: expected every instrument, got --quick too")
    config.pluginmanager.register(Recorder(config), "modulora_conformance_recorder")
    name = config.getoption("--quantizer")
    if name is not None:
        from modulora_core.errors import ModuLoRAError

        try:
            found = configurations(name, config.getoption("--quantizer-option"))
        except ModuLoRAError as error:
            raise pytest.UsageError(str(error)) from None
        config.stash[CONFIGURATIONS] = found


def _check_distribution(config: pytest.Config) -> None:
    """Refuse to certify a class, or to report it, if pytest-xdist may divide it.

    Raises:
        pytest.UsageError: another ``--dist`` than ``loadfile``.
    """
    dist = config.getoption("dist", "no")
    wanted = config.getoption("--certified") or config.getoption("--conformance-report")
    if wanted and dist not in ("no", "loadfile"):
        raise pytest.UsageError(
            "--certified and --conformance-report: expected one process for each class of checks, "
            f"got pytest-xdist with --dist {dist}; add --dist loadfile, or leave -n out"
        )


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("hypothesis_seed", None)
    return f"modulora-conformance suite {SUITE}, --hypothesis-seed={seed}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "conformance_configuration" in metafunc.fixturenames:
        found = metafunc.config.stash.get(CONFIGURATIONS, None)
        if found is None:
            raise pytest.UsageError(
                "modulora_conformance: expected --quantizer NAME, one of `modulora "
                "list-quantizers`, got none"
            )
        metafunc.parametrize("conformance_configuration", found, ids=str)


@pytest.fixture
def golden_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of golden vectors. Without one, the recorder deselects the checks that use it."""
    folder = golden_of(request.node)
    assert folder is not None
    return folder


@pytest.fixture
def measurements(request: pytest.FixtureRequest) -> Measurements:
    """Collects the measurements of a check, beside their limits."""
    found: Measurements = request.node.stash.setdefault(MEASUREMENTS, Measurements())
    return found
