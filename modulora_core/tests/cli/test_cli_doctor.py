"""`modulora doctor` names everything that is wrong, and what mends it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest

from modulora_core import registry
from modulora_core.cli import doctor
from modulora_core.tests.cli.conftest import Run
from modulora_core.tests.fake_site import FakeSite, failing


@pytest.fixture(autouse=True)
def only_toys(monkeypatch: pytest.MonkeyPatch, toy: ModuleType) -> None:
    """Other installed plugins would compile kernels for minutes."""
    known = registry.entries
    monkeypatch.setattr(
        registry, "entries",
        lambda: [e for e in known() if e.name in ("toy", "verbatim", "alpha", "broken")],
    )  # fmt: skip


def findings(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["subject"].partition(" (")[0]: finding for finding in found["findings"]}


def test_a_sound_machine_has_versions_sizes_and_tested_quantizers(run: Run) -> None:
    code, found, _ = run("doctor", "--device", "cpu")
    named = findings(found)
    assert (code, found["faults"]) == (0, 0)
    assert {"Python", "processor", "torch", "memory", "disk", "Hub cache", "toy"} <= named.keys()
    assert named["toy"]["found"].startswith("works, error of a product ")


def test_a_plugin_that_cannot_be_read_is_a_fault_with_advice(run: Run, site: FakeSite) -> None:
    site.install("fake-broken", {"broken": "fake_broken"}, {"fake_broken": failing("no such GPU")})
    code, found, _ = run("doctor", "--device", "cpu")
    broken = findings(found)["broken"]
    assert (code, broken["verdict"]) == (1, "fault")
    assert "no such GPU" in broken["advice"]
    assert "fake-broken" in broken["advice"]


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        (lambda y: y * 1.001, "wrong, error of a product"),
        (lambda y: y * math.nan, "wrong, error of a product"),
        (lambda y: y[:, :-1], "fails"),
    ],
)
def test_a_quantizer_with_a_wrong_product_is_a_fault(
    run: Run, toy: ModuleType, monkeypatch: pytest.MonkeyPatch, product: Any, expected: str
) -> None:
    matmul = toy.Toy.matmul
    monkeypatch.setattr(toy.Toy, "matmul", lambda *words: product(matmul(*words)))
    code, found, _ = run("doctor", "--device", "cpu")
    assert code == 1
    assert findings(found)["toy"]["found"].startswith(expected)


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = doctor.version

    def version(name: str) -> str:
        if name in ("transformers", "trl"):
            raise doctor.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_memory", lambda: None)
    code, found, _ = run("doctor", "--device", "cpu")
    named = findings(found)
    assert (code, named["transformers"]["advice"]) == (1, "pip install transformers")
    assert "trl" not in named  # nobody needs it
    assert "memory" not in named


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "foo"], "device 'foo': expected one that torch can use here"),
        (["--device", "cpu", "--device", "cuda:99"], "device 'cuda:99': expected one that torch"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_the_quantizers(
    run: Run, words: list[str], message: str
) -> None:
    code, refused, _ = run("doctor", *words)
    assert code == 2
    assert message in refused["error"]["message"]


HOOK = """
from modulora_core.hookspecs import CommandSpec, hookimpl

@hookimpl
def modulora_commands():
    return [CommandSpec(name="check-gpu", summary="Measure.", panel="Plugins",
                        location="fake_gpu:command", protocol=2)]
"""

COMMAND = """
from modulora_core.cli.doctor import Finding, report_of

def command(device=[]):
    return report_of([Finding(f"a card {device}", "wrong", "fault", "mend it")])
"""


def test_gpu_has_the_findings_of_the_distribution_that_measures(
    run: Run, site: FakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(registry.BLOCK_VARIABLE, "modulora-conformance")
    modules = {"fake_kit": HOOK, "fake_gpu": COMMAND}
    site.install("fake-kit", {"fake": "fake_kit"}, modules)
    code, found, _ = run("doctor", "--gpu", "--device", "cpu")
    assert (code, found["faults"]) == (1, 1)
    assert findings(found)["a card ['cpu']"]["advice"] == "mend it"


def test_gpu_without_that_distribution_names_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [each for each in registry.commands() if each.distribution == registry.CORE]
    monkeypatch.setattr(registry, "commands", lambda: own)
    code, refused, _ = run("doctor", "--gpu", "--device", "cpu")
    assert code == 2
    assert "modulora-conformance, which isn't installed: run `pip" in refused["error"]["message"]
