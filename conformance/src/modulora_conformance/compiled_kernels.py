"""Checks for CPU kernels that numba compiles, beside the levels of the kit: what compiled code gets wrong and Python can't.

They aren't part of a certificate. A plugin with such kernels subclasses them next to the kit::

    class TestKernels(CompiledKernels):
        @pytest.fixture
        def quantizers(self):
            return [Mine(Options(bits=bits)) for bits in (2, 4)]
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modulora_conformance import another_process, oracle
from modulora_conformance.bits import same_bits
from modulora_conformance.cases import correlated, fit, gaussian, inputs, pack
from modulora_conformance.fresh_process import READY, run_python
from modulora_conformance.tolerances import PRODUCT
from modulora_core import kernels
from modulora_core.spec import PackedWeight, Quantizer

SHAPES = ((1, 1), (1, 16), (3, 129), (5, 2100), (9, 576))
"""Parts of a vector, whole ones, and rows that end anywhere in a byte."""

_AVX2 = "+avx2,+avx,+fma,+bmi,+bmi2,+popcnt,+sse4.2,-avx512f"

INSTRUCTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "avx2": ("avx2", {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": _AVX2}),
    "neither": ("sse2", {"NUMBA_CPU_NAME": "generic"}),
}
"""What the processor must have, and what tells numba to use no more than that. Its own set is what every other test runs."""

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc, and protects pages with mprotect"
)


class CompiledKernels:
    """Subclass this in a test file, as ``Test...``, and give the fixture ``quantizers``.

    Attributes:
        rounding: how far a compiled tile may be from that of plain torch, as a share of the largest magnitude: 0, the same bits, but
            where a tile is a sum, as in a rotated basis.
        packing_share: the most that packing a large weight may take, its own bytes too, as a multiple of the weight in fp32. None
            where packing it takes too long for a test.
        instruction_sets: whether some kernel is written for certain processors, so that what others run is compiled and compared too,
            which takes seconds.
    """

    rounding: ClassVar[float] = 0.0
    packing_share: ClassVar[float | None] = None
    instruction_sets: ClassVar[bool] = False

    @pytest.fixture
    def quantizers(self) -> Sequence[Quantizer]:
        pytest.fail(
            f"{type(self).__name__}: expected a fixture `quantizers`, a list, got none",
            pytrace=False,
        )

    @pytest.fixture
    def weights(self, quantizers: Sequence[Quantizer]) -> list[tuple[Quantizer, PackedWeight]]:
        """What is decoded; override it for weights that hold every code."""
        return [(q, pack(q, gaussian(fit(q, *shape), 0))) for q in quantizers for shape in SHAPES]

    def test_tensors_that_are_mapped_from_a_file_are_read(
        self, quantizers: Sequence[Quantizer], tmp_path: Path
    ) -> None:
        """If this fails: a kernel writes to packed tensors, or counts on alignment, which a tensor in a file needn't have."""
        for i, quantizer in enumerate(quantizers):
            packed = pack(quantizer, gaussian(fit(quantizer, 21, 130), 0))
            out_features, in_features = packed.shape
            path = tmp_path / f"{i}.safetensors"
            save_file(dict(packed.tensors), path)
            path.chmod(0o444)
            with safe_open(path, "pt") as file:
                mapped = packed.layout.fill({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
                tiles = [
                    quantizer.dequantize_tile(p, (1, out_features - 1), torch.float32)
                    for p in (mapped, packed)
                ]
                assert torch.equal(*tiles)
                for transpose, features in ((False, in_features), (True, out_features)):
                    x = inputs((2,), features, torch.float32)
                    assert torch.equal(
                        quantizer.matmul(x, mapped, transpose),
                        quantizer.matmul(x, packed, transpose),
                    )

    def test_several_python_threads_get_what_one_gets(
        self, quantizers: Sequence[Quantizer]
    ) -> None:
        """If this fails: kernels share memory, or enter numba's threads at once, which may end the process: start them with
        :func:`modulora_core.kernels.launch`.
        """
        for quantizer in quantizers:
            shape = fit(quantizer, 64, 259)
            weights = [gaussian(shape, seed) for seed in range(4)]
            seen = None if quantizer.spec.calibration == "none" else correlated(shape[1])
            x = inputs((3,), shape[1], torch.float32)

            def work(
                w: Tensor, quantizer: Quantizer = quantizer, seen: Any = seen, x: Tensor = x
            ) -> list[Tensor]:
                packed = quantizer.pack(w, seen)
                tile = quantizer.dequantize_tile(packed, (0, w.shape[0]), torch.float32)
                return [tile, quantizer.matmul(x, packed), *packed.tensors.values()]

            alone = [work(w) for w in weights]
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(work, weights * 5))
            for i, found in enumerate(together):
                assert all(torch.equal(a, b) for a, b in zip(found, alone[i % 4], strict=True))

    def test_products_do_not_depend_on_the_number_of_threads(
        self, quantizers: Sequence[Quantizer]
    ) -> None:
        """If this fails: each thread has a sum of its own, so that a run can't be repeated on another machine. Cut sums into a fixed number
        of shares, as :data:`modulora_core.kernels.PARTIAL_SUMS` has it.
        """
        before = torch.get_num_threads()
        for quantizer in quantizers:
            packed = pack(quantizer, gaussian(fit(quantizer, 96, 700), 0))
            for transpose in (False, True):
                x = inputs((3,), packed.shape[0 if transpose else 1], torch.float32)
                products = []
                for count in (1, 2):
                    torch.set_num_threads(count)
                    products.append(quantizer.matmul(x, packed, transpose))
                torch.set_num_threads(before)
                assert torch.equal(*products), f"{dict(packed.metadata)}, transpose={transpose}"

    def test_without_numba_everything_works_after_one_warning(
        self, quantizers: Sequence[Quantizer], tmp_path: Path
    ) -> None:
        """If this fails: a module of the plugin imports numba where it isn't needed, or takes the kernels past
        :func:`modulora_core.kernels.load`.
        """
        found = _on_its_own("works", quantizers[0], tmp_path)
        (warning,) = found["warnings"]
        assert "pip install numba" in warning
        out_features, in_features = found["shape"]
        expected = {
            "tile": [out_features - 3, in_features],
            "product": [2, out_features],
            "transposed": [2, in_features],
        }
        assert found["shapes"] == expected

    def test_the_hook_imports_neither_torch_nor_numba(
        self, quantizers: Sequence[Quantizer], tmp_path: Path
    ) -> None:
        """If this fails: every command of modulora waits for seconds."""
        package = quantizers[0].spec.location.partition(".")[0]
        code = f"import sys, {package}; print(*(sys.modules.keys() & {{'torch', 'numba'}}))"
        done = run_python("-c", code, cwd=tmp_path, ready=())
        assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr

    @on_linux
    def test_kernels_read_nothing_beyond_the_last_byte(
        self,
        weights: list[tuple[Quantizer, PackedWeight]],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """If this fails with -11: a kernel reads a vector over the end of a packed tensor."""
        self._assert_elsewhere(weights, tmp_path, monkeypatch)

    @on_linux
    @pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86"
    )
    @pytest.mark.parametrize(("needs", "environment"), INSTRUCTIONS.values(), ids=INSTRUCTIONS)
    def test_other_instruction_sets_give_the_same_values(
        self,
        weights: list[tuple[Quantizer, PackedWeight]],
        needs: str,
        environment: dict[str, str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """If this fails: code that is written for one kind of processor disagrees with that for another."""
        if not self.instruction_sets:
            pytest.skip("no kernel is written for certain processors")
        binding = pytest.importorskip("llvmlite.binding")
        if not binding.get_host_cpu_features().get(needs, False):
            pytest.skip(f"this processor has no {needs}")
        self._assert_elsewhere(weights, tmp_path, monkeypatch, environment)

    @on_linux
    @pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "reference"])
    def test_packing_a_large_weight_takes_little_memory(
        self, quantizers: Sequence[Quantizer], compiled: bool, tmp_path: Path
    ) -> None:
        """If this fails: packing holds several copies of the weight in fp32 at a time. Work on a range of rows after the other."""
        if self.packing_share is None:
            pytest.skip("packing a large weight takes too long")
        found = _on_its_own(
            "packs", quantizers[0], tmp_path, *([] if compiled else ["--without-numba"])
        )
        assert found["share"] <= self.packing_share

    def _assert_elsewhere(
        self,
        weights: list[tuple[Quantizer, PackedWeight]],
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Tiles and products of another process, with ``environment``, are those of plain torch."""
        asked = [_inputs(packed.shape) for _, packed in weights]
        answers = _elsewhere(weights, asked, folder, environment)
        truth = _in_plain_torch(weights, monkeypatch)
        for (_, packed), given, found, W in zip(weights, asked, answers, truth, strict=True):
            self._assert_tiles(found, W, packed)
            for name, x in given.items():
                operand, _, rest = name.partition(".")
                transpose = operand == "dY"
                result = f"{'transposed' if transpose else 'product'}.{rest}"
                error = oracle.product_error(found[result], x, W.double(), transpose)
                assert error <= PRODUCT[torch.float32].value, (packed.shape, result, error)

    def _assert_tiles(self, found: dict[str, Tensor], W: Tensor, packed: PackedWeight) -> None:
        case = f"{packed.shape} with {dict(packed.metadata)}"
        for name, truth in (("tile.float32", W), ("part.float32", W[W.shape[0] // 3 :])):
            if self.rounding == 0:
                assert same_bits(found[name], truth.contiguous()), f"{case}: not plain torch's bits"
            else:
                error = (found[name].double() - truth.double()).abs().max() / W.double().abs().max()
                assert float(error) <= self.rounding, case


def _inputs(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Some rows, and one, for which there may be other kernels."""
    some = another_process.inputs_for(shape, (torch.float32,))
    return some | {f"{name}.one row": x[:1].clone() for name, x in some.items()}


def _elsewhere(
    weights: list[tuple[Quantizer, PackedWeight]],
    asked: Sequence[dict[str, Tensor]],
    folder: Path,
    environment: dict[str, str] | None = None,
) -> list[dict[str, Tensor]]:
    """The tiles, and the products that are asked for, of all weights, from one other process that has them at the end of memory."""
    folders = [folder / str(i) for i in range(len(weights))]
    for (quantizer, packed), given, own in zip(weights, asked, folders, strict=True):
        another_process.write_request(quantizer, packed, given, own, at_the_end_of_memory=True)
    another_process.answer(folder, environment)
    return [another_process.results_in(own) for own in folders]


def _in_plain_torch(
    weights: list[tuple[Quantizer, PackedWeight]], monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Ŵ of each weight, fp32, on the path that runs where no kernel can."""
    without: Callable[..., None] = lambda module, device: None  # noqa: E731, ARG005 - load's own names
    monkeypatch.setattr(kernels, "load", without)
    return [q.dequantize_tile(packed, (0, packed.shape[0]), torch.float32) for q, packed in weights]


def _on_its_own(job: str, quantizer: Quantizer, folder: Path, *more: str) -> dict[str, Any]:
    options = quantizer.options.model_dump_json()
    words = ("-m", "modulora_conformance.on_its_own", job, quantizer.spec.name, options, *more)
    done: subprocess.CompletedProcess[str] = run_python(
        *words, cwd=folder, ready=(*READY, "modulora_conformance.cases")
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
