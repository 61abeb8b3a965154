"""A quantizer with kernels: its modules, or plain torch where a module is missing."""

import sys
from functools import lru_cache

import modulora_kernels as kernels
import pytest
import torch
from modulora_kernels import KernelQuantizer, compiled

from modulora_core.packed import TensorLayout
from modulora_core.spec import QuantizerSpec

SPEC = QuantizerSpec(
    name="outsider", summary="codes over eight", location="here:Outsider", protocol=2, bits=(8,)
)


class Outsider(KernelQuantizer):
    spec = SPEC
    kernels = "outsiders.kernels"
    row_tensors = ("codes",)

    def pack(self, weight, _calibration=None):
        codes = (weight * 8).round().to(torch.int8)
        return self.layout((weight.shape[0], weight.shape[1])).fill({"codes": codes})

    @staticmethod
    @lru_cache
    def tensors(shape):
        return {"codes": TensorLayout("int8", shape)}

    def reference_tile(self, packed, rows):
        return packed.tensors["codes"][slice(*rows)].float() / 8


CPU_MODULE = """
import torch

def tile(packed, rows, dtype):
    return torch.full((rows[1] - rows[0], packed.shape[1]), 7, dtype=dtype)

def product(x, packed, transpose):
    return None if len(x) > 1 else torch.full((1, packed.shape[1 if transpose else 0]), 9.0)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of kernels without a module."""
    folder = tmp_path / "outsiders" / "kernels"
    folder.mkdir(parents=True)
    for init in (folder, folder.parent):
        (init / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "outsiders"]:
        monkeypatch.delitem(sys.modules, name)  # of another test
    compiled._exists.cache_clear()
    kernels.load.cache_clear()
    return folder


@pytest.mark.usefixtures("package")
def test_without_a_module_plain_torch_makes_the_tiles():
    """As on a GPU, if the plugin has no kernels/gpu.py."""
    quantizer, W = Outsider(), torch.randint(-8, 9, (6, 4)) / 8
    packed = quantizer.pack(W)
    assert torch.equal(quantizer.dequantize_tile(packed, (1, 5), torch.float64), W[1:5].double())
    for n in (1, 70):
        x, y = torch.ones(n, 4), torch.ones(n, 6)
        assert torch.equal(quantizer.matmul(x, packed), x @ W.T)
        assert torch.equal(quantizer.matmul(y, packed, transpose=True), y @ W)
    ids = torch.tensor([[5, 0], [2, 2]])
    assert torch.equal(quantizer.lookup(ids, packed, torch.float32), W[ids])


def test_a_module_makes_tiles_and_the_products_that_it_takes(package):
    pytest.importorskip("numba")
    (package / "cpu.py").write_text(CPU_MODULE, encoding="utf-8")
    quantizer = Outsider()
    packed = quantizer.pack(torch.zeros(6, 4))
    assert quantizer.dequantize_tile(packed, (0, 2), torch.float32).unique().tolist() == [7]
    assert quantizer.matmul(torch.ones(1, 4), packed).unique().tolist() == [9]
    assert quantizer.matmul(torch.ones(2, 4), packed).unique().tolist() == [28]  # by tiles
