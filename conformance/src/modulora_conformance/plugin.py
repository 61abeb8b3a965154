"""The pytest plugin: options, the configurations that a run covers, and the order, the outcomes and the report of the checks.

It is imported by every run of pytest where the kit is installed: nothing here imports torch before a check is collected.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modulora_conformance import SUITE
from modulora_conformance.measurements import Measurements
from modulora_conformance.recorder import MEASUREMENTS, Recorder, golden_of

if TYPE_CHECKING:
    from modulora_conformance.configurations import Configuration

LEVELS = range(8)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("modulora-conformance", "ModuLoRA conformance kit")
    add = group.addoption
    add(
        "--quantizer",
        metavar="NAME",
        help="the quantizer to check, with --pyargs modulora_conformance",
    )
    options = "an option of it; repeat for more (default: those that its spec makes promises for)"
    add("--quantizer-option", metavar="KEY=VALUE", action="append", default=[], help=options)
    add(
        "--conformance-level",
        metavar="N",
        type=int,
        choices=LEVELS,
        default=LEVELS[-1],
        help="run levels 0 to N",
    )
    add("--certified", action="store_true", help="allow no skip but that of missing hardware")
    add("--conformance-report", metavar="DIR", type=Path, help="write the reports there")
    add("--golden", metavar="DIR", type=Path, help="golden vectors for --quantizer")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its seed
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    config.pluginmanager.register(Recorder(config), "modulora_conformance_recorder")


def pytest_report_header(config: pytest.Config) -> str:
    return f"modulora-conformance suite {SUITE}, --hypothesis-seed={config.getoption('hypothesis_seed', None)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "conformance_configuration" in metafunc.fixturenames:
        found = _configurations(metafunc.config)
        metafunc.parametrize("conformance_configuration", found, ids=[item.title for item in found])


def _configurations(config: pytest.Config) -> list[Configuration]:
    from modulora_conformance.configurations import configurations
    from modulora_core.errors import ModuLoRAError

    name = config.getoption("--quantizer")
    if name is None:
        raise pytest.UsageError(
            "modulora_conformance: expected --quantizer NAME, one of `modulora list-quantizers`, got none"
        )
    try:
        return configurations(name, config.getoption("--quantizer-option"))
    except ModuLoRAError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture
def golden_folder(request: pytest.FixtureRequest) -> Path:
    """Golden vectors to hold the quantizer to; the recorder leaves out the checks that want some where there are none."""
    folder = golden_of(request.node)
    assert folder is not None
    return folder


@pytest.fixture
def measurements(request: pytest.FixtureRequest) -> Measurements:
    """Where a check of the kit leaves what it measures, beside the limit."""
    found: Measurements = request.node.stash.setdefault(MEASUREMENTS, Measurements())
    return found
