"""In its surroundings: memory-mapped checkpoints, several Python threads, little memory, no numba, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from modulora_half_quadratic.quantizer import HalfQuadratic, Options
from safetensors import safe_open
from safetensors.torch import save_file

OPTIONS = [Options(bits=3), Options(bits=8, group_size=48)]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kernels_read_tensors_that_are_mapped_from_a_file(options, generator, tmp_path: Path):
    quantizer = HalfQuadratic(options)
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


def test_several_python_threads_get_what_one_gets(generator):
    quantizer = HalfQuadratic(Options(bits=3, iterations=3))
    weights = [torch.randn(130, 515, generator=generator) for _ in range(4)]
    x = torch.randn(3, 515, generator=generator)

    def work(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = quantizer.pack(w)
        return quantizer.dequantize_tile(packed, (0, 130), torch.float32), quantizer.matmul(x, packed)

    alone = [work(w) for w in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, weights * 5))
    for i, (tile, y) in enumerate(together):
        assert torch.equal(tile, alone[i % 4][0])
        assert torch.equal(y, alone[i % 4][1])


def test_without_numba_everything_works_after_one_warning():
    done = run("""
        import sys, warnings
        sys.modules["numba"] = None  # importing it raises ImportError
        import torch
        from modulora_half_quadratic.quantizer import HalfQuadratic
        w = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            packed = HalfQuadratic().pack(w)
            tile = HalfQuadratic().dequantize_tile(packed, (3, 40), torch.bfloat16)
            y = HalfQuadratic().matmul(torch.ones(2, 70), packed)
            z = HalfQuadratic().matmul(torch.ones(2, 40), packed, True)
        assert len(caught) == 1, [str(c.message) for c in caught]
        assert "pip install numba" in str(caught[0].message)
        assert tile.shape == (37, 70) and y.shape == (2, 40) and z.shape == (2, 70)
    """)
    assert done.returncode == 0, done.stderr


def test_neither_the_hook_nor_the_options_import_torch_or_numba():
    done = run("""
        import sys
        import modulora_half_quadratic, modulora_half_quadratic.options
        (spec,) = modulora_half_quadratic.modulora_quantizers()
        assert spec.name == "half-quadratic"
        print(*(sys.modules.keys() & {"torch", "numba"}))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM from /proc")
def test_packing_needs_at_most_two_and_a_half_times_the_fp32_weight():
    done = run("""
        from pathlib import Path
        import torch
        from modulora_half_quadratic.quantizer import HalfQuadratic, Options

        def peak():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])

        quantizer = HalfQuadratic(Options(iterations=1))
        quantizer.pack(torch.randn(512, 512))  # what is loaded once is not the weight's
        w = torch.empty(4096, 4096, dtype=torch.bfloat16).normal_().t()
        before = peak() - w.numel() * w.element_size()
        quantizer.pack(w)
        print((peak() - before) / (4 * w.numel()))
    """)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 2.5, done.stdout


def test_the_command_line_finds_it_by_its_entry_point_alone(tmp_path: Path):
    """As pip would have installed it: a folder of metadata beside the module."""
    info = tmp_path / "modulora_half_quadratic-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modulora-half-quadratic\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[modulora]\nhalf-quadratic = modulora_half_quadratic\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "modulora_core.cli", "list-quantizers", "--json"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    import json

    (listed,) = (q for q in json.loads(done.stdout)["quantizers"] if q["name"] == "half-quadratic")
    assert listed["status"] == "ok"
    assert listed["bits"] == [1, 2, 3, 4, 5, 6, 7, 8]
