"""QuIP# in its surroundings: mapped files, the end of memory, other processors, several Python threads, no numba."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, from_solution
from safetensors import safe_open
from safetensors.torch import save_file

from modulora_core.spec import Calibration

OPTIONS = [Options(bits=bits) for bits in (2, 3, 4)]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.bits}bit")
def test_kernels_read_tensors_that_are_mapped_from_a_file(
    options, generator, random_solution, tmp_path: Path
):
    quantizer = QuIPSharpE8(options)
    packed = from_solution(random_solution((21, 130), options), options)
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
    weights = [torch.randn(40, 130, generator=generator) for _ in range(3)]
    inputs = torch.randn(400, 130, generator=generator)
    seen = Calibration(inputs.t() @ inputs / 400, 400)

    def work(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        packed = QuIPSharpE8().pack(w, seen)
        return QuIPSharpE8().dequantize_tile(packed, (0, 40), torch.float32), QuIPSharpE8().matmul(
            inputs[:3], packed
        )

    alone = [work(w) for w in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, weights * 5))
    for i, (tile, y) in enumerate(together):
        assert torch.equal(tile, alone[i % 3][0])
        assert torch.equal(y, alone[i % 3][1])


def test_without_numba_everything_works_after_one_warning():
    done = run("""
        import sys, warnings
        sys.modules["numba"] = None  # importing it raises ImportError
        import torch
        from modulora_core.spec import Calibration
        from modulora_quip_sharp_e8.quantizer import QuIPSharpE8
        w = torch.randn(20, 70, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            packed = QuIPSharpE8().pack(w, Calibration(torch.eye(70), 1))
            tile = QuIPSharpE8().dequantize_tile(packed, (3, 20), torch.bfloat16)
            y = QuIPSharpE8().matmul(torch.ones(2, 70), packed)
            z = QuIPSharpE8().matmul(torch.ones(2, 20), packed, True)
        assert len(caught) == 1, [str(c.message) for c in caught]
        assert "pip install numba" in str(caught[0].message)
        assert tile.shape == (17, 70) and y.shape == (2, 20) and z.shape == (2, 70)
    """)
    assert done.returncode == 0, done.stderr


def test_the_hook_imports_neither_torch_nor_numba():
    done = run("""
        import sys
        import modulora_quip_sharp_e8
        (spec,) = modulora_quip_sharp_e8.modulora_quantizers()
        assert spec.name == "quip-sharp-e8"
        print(*(sys.modules.keys() & {"torch", "numba"}))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


AT_THE_END_OF_MEMORY = """
import ctypes, mmap, torch
from modulora_core.spec import PackedWeight
from modulora_quip_sharp_e8.options import Options
from modulora_quip_sharp_e8 import codebooks
from modulora_quip_sharp_e8.quantizer import QuIPSharpE8, _decode, from_solution
from modulora_quip_sharp_e8.reference import Solution

libc = ctypes.CDLL(None, use_errno=True)
keep = []

def moved(tensor):
    '''The same tensor, with nothing that may be read after its last byte.'''
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    keep.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(begin + pages), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size).view(tensor.shape)
    return copy.copy_(tensor)

for bits in (2, 3, 4):
    options = Options(bits=bits)
    for shape in ((1, 1), (1, 16), (3, 129), (5, 2100), (9, 576)):
        blocks = shape[0], -(-shape[1] // 8)
        codes = torch.randint(-2**15, 2**15, blocks, dtype=torch.int16)
        residual = None if bits == 2 else torch.randint(0, 256, blocks, dtype=torch.uint8)
        residual = codes.flip(0, 1).contiguous() if bits == 4 else residual
        solution = Solution(codes, residual, torch.ones(shape[1]).half(), torch.ones(shape[0]).half(), torch.ones(1))
        packed = from_solution(solution, options)
        tight = packed.layout.fill({name: moved(tensor) for name, tensor in packed.tensors.items()})
        tile = _decode(tight, slice(None), slice(None), shape[1])
        assert torch.equal(tile, codebooks.decode(codes, residual, bits)[:, :shape[1]])
        if MATMUL:
            QuIPSharpE8(options).dequantize_tile(tight, (0, shape[0]), torch.float32)
            QuIPSharpE8(options).matmul(torch.ones(1, shape[1]), tight)
            QuIPSharpE8(options).matmul(torch.ones(1, shape[0]), tight, True)
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects a page with mprotect")
def test_kernels_read_nothing_beyond_the_last_byte():
    """If this fails with a signal: a kernel reads a vector over the end of codes, residuals or scales."""
    done = run("MATMUL = True\n" + AT_THE_END_OF_MEMORY)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


AVX2 = "+avx2,+avx,+fma,+bmi,+bmi2,+popcnt,+sse4.2,-avx512f"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86")
@pytest.mark.parametrize(
    ("needs", "environment"),
    [("avx2", {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2}), ("sse2", {"NUMBA_CPU_NAME": "generic"})],
    ids=["avx2", "neither"],
)  # fmt: skip
def test_other_instruction_sets_decode_to_the_same_bits(needs: str, environment: dict[str, str]):
    from llvmlite import binding

    if not binding.get_host_cpu_features().get(needs, False):
        pytest.skip(f"this processor has no {needs}")
    done = run("MATMUL = False\n" + AT_THE_END_OF_MEMORY, **environment)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
