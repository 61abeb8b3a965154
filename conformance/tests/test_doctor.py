"""`modulora doctor` names everything that is wrong, and what mends it."""

import math

import pytest
from modulora_conformance.commands import check_gpu, doctor
from modulora_conformance.findings import Finding

from modulora_core import registry
from modulora_core.tests.fake_site import failing


@pytest.fixture(autouse=True)
def only_toys(monkeypatch, toy):
    """Other installed plugins would compile kernels for minutes."""
    known = registry.entries
    monkeypatch.setattr(
        registry, "entries",
        lambda: [e for e in known() if e.name in ("toy", "verbatim", "alpha", "broken")],
    )  # fmt: skip


def findings(found):
    return {finding["subject"].partition(" (")[0]: finding for finding in found["findings"]}


def test_a_sound_machine_has_versions_sizes_and_tested_quantizers(run_command):
    code, found, _ = run_command("doctor", "--device", "cpu")
    named = findings(found)
    assert (code, found["faults"]) == (0, 0)
    assert {"Python", "processor", "torch", "memory", "disk", "Hub cache", "toy"} <= named.keys()
    assert named["toy"]["found"].startswith("works, error of a product ")


def test_a_plugin_that_cannot_be_read_is_a_fault_with_advice(run_command, empty_site):
    empty_site.install(
        "fake-broken", {"broken": "fake_broken"}, {"fake_broken": failing("no such GPU")}
    )
    code, found, _ = run_command("doctor", "--device", "cpu")
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
    run_command, toy, monkeypatch, product, expected
):
    matmul = toy.Toy.matmul
    monkeypatch.setattr(toy.Toy, "matmul", lambda *words: product(matmul(*words)))
    code, found, _ = run_command("doctor", "--device", "cpu")
    assert code == 1
    assert findings(found)["toy"]["found"].startswith(expected)


def test_a_missing_library_is_named_with_the_command_that_installs_it(run_command, monkeypatch):
    known = doctor.version

    def version(name):
        if name in ("transformers", "trl"):
            raise doctor.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "_memory", lambda: None)
    code, found, _ = run_command("doctor", "--device", "cpu")
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
def test_a_device_that_is_not_there_is_refused_before_the_quantizers(run_command, words, message):
    code, refused, _ = run_command("doctor", *words)
    assert code == 2
    assert message in refused["error"]["message"]


def test_gpu_has_the_findings_of_check_gpu(run_command, monkeypatch):
    wrong = Finding("a card", "wrong", "fault", "mend it")
    monkeypatch.setattr(check_gpu, "findings", lambda device: [wrong])
    code, found, _ = run_command("doctor", "--gpu", "--device", "cpu")
    assert (code, found["faults"]) == (1, 1)
    assert findings(found)["a card"]["advice"] == "mend it"
