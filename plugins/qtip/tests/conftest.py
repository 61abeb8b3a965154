"""Packed weights of random walks, a dense model, and commands that are refused."""

import pytest
import torch
from modulora_conformance.fixtures import generator, layer, one_thread, plain_torch  # noqa: F401
from modulora_qtip import trellis
from modulora_qtip.reference import Solution

from modulora_core.cli import main
from modulora_core.tests.adapted_models import save_llama_with_tokenizer


@pytest.fixture(scope="session")
def random_solution():
    """``random_solution((M, N), options)``: every bit pattern, scales as after a rescaling."""

    def make(shape, options):
        numbers = torch.Generator().manual_seed(0)
        block = options.block or 1
        M, N = (-(-n // block) * block for n in shape)
        walks = (-(-N // 16), -(-M // 16), trellis.units(options.bits))

        def scales(n):
            signs = torch.where(torch.randn(n, generator=numbers) > 0, 1.0, -1.0)
            return (signs * (0.5 + torch.rand(n, generator=numbers))).half()

        strings = torch.randint(-(2**15), 2**15, walks, generator=numbers, dtype=torch.int16)
        return Solution(strings, scales(N), scales(M), torch.tensor([0.017]))

    return make


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """The folder of a tiny Llama, with a text for calibration."""
    folder = tmp_path_factory.mktemp("dense")
    save_llama_with_tokenizer(folder, intermediate_size=48)
    (folder / "text.txt").write_text("a line to learn by heart, again and again\n" * 50)
    return folder


@pytest.fixture
def refused(capsys):
    """``refused(words)``: the one sentence of a command that must end with exit code 2."""

    def run(words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert told.count("error:") == 1
        assert "Traceback" not in told
        return told

    return run
