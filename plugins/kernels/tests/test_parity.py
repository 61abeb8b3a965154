"""Kernels are compared with plain torch where they run, and those that differ are not used."""

import sys

import pytest
import torch
from modulora_kernels import KernelQuantizer, compiled
from modulora_kernels.parity import compare

from modulora_core.packed import PackedWeight, TensorLayout
from modulora_core.spec import QuantizerSpec

KERNELS = """
import torch

def tile(packed, rows, dtype):
    return {scale} * packed.tensors["values"][rows[0]:rows[1]].to(dtype)

def product(x, packed, transpose):
    {product}
"""

SOUND = "return None"
WRONG = {
    "a tile twice as large": ("2", SOUND),
    "a product of zeros": ("1", "return x.new_zeros(len(x), packed.shape[1 if transpose else 0])"),
    "NaN": ("1", "return x.new_full((len(x), packed.shape[1 if transpose else 0]), float('nan'))"),
    "an exception": ("1", "raise RuntimeError('no such instruction')"),
}


class Stored(KernelQuantizer):
    """Stores the weight as it is."""

    spec = QuantizerSpec(
        name="stored",
        summary="as it is",
        bits=(32,),
        devices=("cpu",),
        location="somewhere:Stored",
        protocol=2,
    )

    @staticmethod
    def tensors(shape, **_):
        return {"values": TensorLayout("float32", shape)}

    def pack(self, weight, calibration=None):
        shape = (weight.shape[0], weight.shape[1])
        return PackedWeight(self.spec.name, self.format, shape, {"values": weight.clone()}, {})

    def reference_tile(self, packed, rows):
        return packed.tensors["values"][rows[0] : rows[1]]


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    before = set(compiled._WRONG)
    yield
    compiled._WRONG.clear()
    compiled._WRONG.update(before)


def stored(folder, monkeypatch, scale, product):
    """The quantizer with kernels in a package of its own."""
    name = f"kernels_{folder.name}"
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cpu.py").write_text(KERNELS.format(scale=scale, product=product))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return type("Mine", (Stored,), {"kernels": name})()


W = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_kernels_pass_and_are_used(tmp_path, monkeypatch, dtype, recwarn):
    quantizer = stored(tmp_path, monkeypatch, "1", SOUND)
    packed = quantizer.pack(W)
    results = list(compare(quantizer, packed, dtype))
    assert [each.result for each in results] == [
        "tile", "product with 1 row", "product with 1 row, transposed", "product with 17 rows",
        "product with 17 rows, transposed",
    ]  # fmt: skip
    assert all(each.passed and each.kernels == (quantizer.kernels,) for each in results)
    assert quantizer.check_kernels(packed, dtype) == []
    assert not recwarn
    assert compiled.for_device(quantizer.kernels, W.device) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", WRONG)
def test_wrong_kernels_are_named_once_and_replaced(tmp_path, monkeypatch, fault, dtype):
    quantizer = stored(tmp_path, monkeypatch, *WRONG[fault])
    packed = quantizer.pack(W)
    (difference,) = quantizer.check_kernels(packed, dtype)
    for part in (quantizer.kernels, "[9, 12]", str(dtype).removeprefix("torch.")):
        assert part in difference
    assert quantizer.check_kernels(packed, dtype) == []
    x = torch.ones(1, 12)
    assert torch.allclose(quantizer.matmul(x, packed), x @ W.t(), rtol=1e-5)
    assert torch.equal(quantizer.dequantize_tile(packed, (2, 5), torch.float32), W[2:5])
