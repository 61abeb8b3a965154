"""Predictions from machine code and arithmetic, for work whose size is known."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
predicted = pytest.importorskip("modulora_conformance.predicted")
from modulora_conformance import ahead_of_time, gpu  # noqa: E402
from modulora_conformance.fake_device import fake_cuda  # noqa: E402
from modulora_kernels.triton.launching import launch  # noqa: E402

from modulora_core.layers import LoRALinear, QuantLinear  # noqa: E402
from modulora_core.packed_parameters import PackedParameter  # noqa: E402
from modulora_core.registry import create  # noqa: E402

CARD = predicted.CARDS["H100"]


@triton.jit
def copy(source, to, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + at, tl.load(source + at, mask=at < n), mask=at < n)


@triton.jit
def across_kernel(x, out, K, TERMS: tl.constexpr):
    at = tl.arange(0, 128)
    total = tl.zeros((128,), tl.float32)
    for first in range(0, K, TERMS):
        total += tl.load(x + first * 128 + at)
    tl.store(out + at, total)


def recorded(kernel, *arguments, programs=1, **constants):
    with ahead_of_time.recorded() as calls:
        launch(kernel, lambda _: (programs,), arguments, constants)
    return calls[0]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "gfx942"])
def test_the_instructions_of_a_copy_are_its_loads_and_stores(target):
    call = recorded(copy, torch.empty(4096), torch.empty(4096), 4096, BLOCK=512)
    executed = predicted.per_thread(call, ahead_of_time.compile_call(call, target))
    assert predicted.threads(call) == 512 // 4  # a vector of 16 bytes a thread
    assert executed["memory"] == 2
    assert executed["flops"] == executed["conversion"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_instructions_of_a_loop_count_as_often_as_it_runs(target):
    sums = []
    for terms in (10, 20):
        call = recorded(across_kernel, torch.empty(terms * 128), torch.empty(128), terms, TERMS=1)
        executed = predicted.per_thread(call, ahead_of_time.compile_call(call, target))
        sums.append((executed["float"], executed["memory"]))
    assert sums[1][0] - sums[0][0] >= 10, "an addition a turn"
    assert sums[1][1] - sums[0][1] >= 10, "a load a turn"


@pytest.mark.slow
def test_a_large_copy_takes_the_time_of_its_bytes():
    x = torch.empty(2**24)
    call = recorded(copy, x, torch.empty_like(x), len(x), programs=2**14, BLOCK=1024)
    expected = 2 * x.nbytes / CARD.bandwidth
    assert predicted.seconds_of_call(call, None, CARD) == pytest.approx(expected)


def test_work_counts_launches_bytes_and_products():
    with fake_cuda(values=False):
        x = torch.empty(64, 128, device="cuda")
        with predicted.Work() as work:
            y = x @ torch.empty(128, 32, device="cuda")
            y.t().view(32, 64).add_(1.0)
    assert work.operations == ["mm", "add_"]
    assert work.flops == 2 * 64 * 128 * 32
    assert work.moved == y.nbytes
    assert work.waits == []


def test_work_sees_each_value_that_the_host_waits_for():
    with fake_cuda(), predicted.Work() as work:
        x = torch.ones(8, device="cuda")
        assert bool(x.sum() == 8)
        x.unique()
        x.cpu()
    assert work.waits == ["_local_scalar_dense", "_unique2", "_to_copy"]


@pytest.mark.parametrize(
    ("name", "flops"),
    [("HMMA.16816.F32.BF16", 16 * 8 * 16 * 2 / 32), ("HGMMA.64x32x16.F32.BF16", 64 * 32 * 16 / 64)],
)
def test_a_product_of_small_matrices_is_shared_by_its_threads(name, flops):
    assert predicted.class_of(name) == "tensor"
    assert predicted.flops_of(name) == flops


@pytest.mark.parametrize("name", ["int8", "fp4", "gguf", "optq"])
def test_decoding_waits_for_nothing_and_launches_four_kernels_a_layer(name):
    """A CUDA graph holds no wait. The kernels: xŴᵀ, xAᵀ, the rest of the adapter, and the sum."""
    quantizer = create(name)
    with fake_cuda(values=False):
        table = quantizer.layout((512, 256)).empty("cuda")
        layer = LoRALinear(QuantLinear(PackedParameter(quantizer, table)))
        layer.add_adapter("default", 8, alpha=16, dtype=torch.bfloat16)
        ids = torch.empty(1, 1, dtype=torch.int64, device="cuda")
        with torch.no_grad():
            for _ in range(2):  # tables are made once
                with predicted.Work() as lookup:
                    x = quantizer.lookup(ids, table, torch.bfloat16)
                with predicted.Work() as product:
                    layer(x)
    assert lookup.waits == product.waits == []
    assert product.operations == ["mm", "addmm", "add"]
    assert len(product.calls) == len(lookup.calls) == 1


def test_measured_products_have_the_least_time_beside_them():
    """And the prediction, of a fake device, leaves no tables in this process."""
    found = list(gpu.products("nf4", torch.device("cpu"), CARD))
    titles = [
        re.match(r"(.*) in \d+ µs \(by arithmetic at least \d+ µs\), ", line) for line in found
    ]
    assert [title and title[1] for title in titles] == ["a row", "64 rows", "64 rows, transposed,"]
    assert not [line for line in gpu.products("nf4", torch.device("cpu")) if "arithmetic" in line]


def test_a_card_is_known_by_its_name():
    assert predicted.card_named("NVIDIA H100 80GB HBM3") is CARD
    assert predicted.card_named("NVIDIA GeForce GTX 1060") is None
    assert gpu.card_of(torch.device("cpu")) is None
