"""``modulora check-gpu`` measures quantizers, and lists one that raises."""

import pytest
import torch

from modulora_core import registry


@pytest.fixture(autouse=True)
def only_the_toy(monkeypatch, toy):
    """Other installed plugins would compile kernels for minutes."""
    known = registry.entries
    monkeypatch.setattr(registry, "entries", lambda: [e for e in known() if e.name == "toy"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_is_refused(run_command):
    code, refused, _ = run_command("check-gpu")
    assert code == 2
    assert "expected a GPU" in refused["error"]["message"]


def test_a_device_that_is_not_there_is_refused(run_command):
    code, refused, _ = run_command("check-gpu", "--device", "cuda:99")
    assert code == 2
    assert "device 'cuda:99': expected one that torch can use" in refused["error"]["message"]


@pytest.mark.slow
def test_a_device_may_be_named_instead_of_a_gpu(run_command):
    code, found, _ = run_command("check-gpu", "--device", "cpu")
    texts = [each["found"] for each in found["findings"] if each["subject"] == "toy on cpu"]
    assert code == 0
    assert texts[0] == "no kernels, plain torch"
    assert all("× dense" in text for text in texts[1:4])  # of a row, and of more in both directions
    assert "tokens/s" in texts[4]


def test_it_lists_a_quantizer_that_raises_as_a_fault(run_command, toy, monkeypatch):
    def matmul(*words):
        raise ArithmeticError("no such rows")

    monkeypatch.setattr(toy.Toy, "matmul", matmul)
    code, found, _ = run_command("check-gpu", "--device", "cpu")
    advice = {f["advice"] for f in found["findings"] if f["subject"] == "toy on cpu"}
    assert (code, advice) == (1, {"ArithmeticError: no such rows"})
