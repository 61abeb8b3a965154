"""What is watched in every check: memory that is handed out, and what outlives a call."""

import numpy as np
import pytest
import torch
from modulora_conformance.watching import Findings, blaming, filled_memory, watching
from modulora_zoo.healthy import Healthy

SHAPE = (1024, 1024)
TABLES = {}
"""What quantizers of these tests keep."""


class MakesATable(Healthy):
    """Sound: a table of two million numbers is made once."""

    def matmul(self, x, packed, transpose=False):
        if "table" not in TABLES:
            TABLES["table"] = torch.zeros(2**21)
        return Healthy.matmul(self, x, packed, transpose)


class KeepsTheLastWeight(Healthy):
    def matmul(self, x, packed, transpose=False):
        TABLES["weight"] = self.decode(packed, (0, packed.shape[0]))
        return Healthy.matmul(self, x, packed, transpose)


@pytest.mark.parametrize(("cls", "count"), [(MakesATable, 0), (KeepsTheLastWeight, 1)])
def test_a_weight_that_outlives_a_call_is_found_and_a_table_is_not(cls, count):
    TABLES.clear()
    quantizer, findings = cls(cls.Options()), Findings()
    packed = quantizer.pack(torch.randn(SHAPE))
    with watching(cls, findings, "a check"):
        quantizer.matmul(torch.randn(2, SHAPE[1]), packed)
    assert len(findings.memory) == count
    assert not findings.arguments
    assert not findings.process


class ClampsItsRows(Healthy):
    def matmul(self, x, packed, transpose=False):
        return Healthy.matmul(self, x.clamp_(-1, 1), packed, transpose)


def test_a_failure_names_the_argument_that_a_call_has_changed():
    quantizer, findings = ClampsItsRows(ClampsItsRows.Options()), Findings()
    packed = quantizer.pack(torch.randn(4, 8))
    said = "matmul of a [4, 8] weight: expected x unchanged, got other bytes; then: 7.777"
    with (
        pytest.raises(pytest.fail.Exception) as caught,
        watching(ClampsItsRows, findings, "a check"),
        blaming(findings),
    ):
        quantizer.matmul(torch.full((2, 8), 3.0), packed)
        pytest.fail("7.777")
    assert str(caught.value) == said


def test_a_failure_without_a_changed_argument_keeps_its_message():
    findings = Findings(arguments=["of an earlier check"])
    with pytest.raises(AssertionError, match="its own"), blaming(findings):
        raise AssertionError("its own")


@pytest.mark.parametrize("size", [1000, 2**21])
def test_new_memory_holds_no_earlier_values(size):
    with filled_memory():
        found = [torch.empty(size), torch.from_numpy(np.empty(size, np.float32))]
        halves = torch.empty(size, dtype=torch.float16)
    if not bool(halves.isnan().all()):
        pytest.skip("this system's allocator fills no memory")
    assert all(bool((tensor.abs() > 1e38).all()) for tensor in found)
