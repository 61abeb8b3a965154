"""INT8 in its surroundings: memory-mapped checkpoints, several Python threads, little memory, no numba."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from modulora_int8.quantizer import INT8, Options
from safetensors import safe_open
from safetensors.torch import save_file

OPTIONS = [Options(), Options(group_size=48)]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kernels_read_tensors_that_are_mapped_from_a_file(options, generator, tmp_path: Path):
    quantizer = INT8(options)
    packed = quantizer.pack(torch.randn(21, 130, generator=generator))
    path = tmp_path / "packed.safetensors"
    save_file(dict(packed.tensors), path)
    path.chmod(0o444)
    with safe_open(path, "pt") as file:
        mapped = packed.layout.fill({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
        x, y = torch.randn(2, 130, generator=generator), torch.randn(2, 21, generator=generator)
        tile = quantizer.dequantize_tile(mapped, (1, 20), torch.float32)
        assert torch.equal(tile, quantizer.dequantize_tile(packed, (1, 20), torch.float32))
        assert torch.equal(quantizer.matmul(x, mapped), quantizer.matmul(x, packed))
        assert torch.equal(quantizer.matmul(y, mapped, True), quantizer.matmul(y, packed, True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_python_threads_get_what_one_gets(options, generator):
    quantizer = INT8(options)
    weights = [torch.randn(130, 515, generator=generator) for _ in range(4)]
    x = torch.randn(3, 515, generator=generator)

    def work(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = quantizer.pack(w)
        return quantizer.dequantize_tile(packed, (0, 130), torch.float32), quantizer.matmul(x, packed)

    alone = [work(w) for w in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, weights * 10))
    for i, (tile, y) in enumerate(together):
        assert torch.equal(tile, alone[i % 4][0])
        assert torch.equal(y, alone[i % 4][1])


def test_without_numba_everything_works_after_one_warning():
    done = run("""
        import sys, warnings
        sys.modules["numba"] = None  # importing it raises ImportError
        import torch
        from modulora_int8.quantizer import INT8
        w = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            packed = INT8().pack(w)
            tile = INT8().dequantize_tile(packed, (3, 40), torch.bfloat16)
            y = INT8().matmul(torch.ones(2, 70), packed)
            z = INT8().matmul(torch.ones(2, 40), packed, True)
        assert len(caught) == 1, [str(c.message) for c in caught]
        assert "pip install numba" in str(caught[0].message)
        assert tile.shape == (37, 70) and y.shape == (2, 40) and z.shape == (2, 70)
    """)
    assert done.returncode == 0, done.stderr


def test_the_hook_imports_neither_torch_nor_numba():
    done = run("""
        import sys
        import modulora_int8
        (spec,) = modulora_int8.modulora_quantizers()
        assert spec.name == "int8"
        print(*(sys.modules.keys() & {"torch", "numba"}))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM from /proc")
@pytest.mark.parametrize("numba", [True, False], ids=["kernels", "reference"])
def test_packing_needs_at_most_two_and_a_half_times_the_fp32_weight(numba):
    done = run(f"""
        import sys, warnings
        from pathlib import Path
        if not {numba}:
            sys.modules["numba"] = None
            warnings.simplefilter("ignore")
        import torch
        from modulora_int8.quantizer import INT8

        def peak():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])

        INT8().pack(torch.randn(512, 512))  # what is loaded once is not the weight's
        w = torch.empty(4096, 4096, dtype=torch.bfloat16).normal_().t()
        before = peak() - w.numel() * w.element_size()
        INT8().pack(w)
        print((peak() - before) / (4 * w.numel()))
    """)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 2.5, done.stdout
