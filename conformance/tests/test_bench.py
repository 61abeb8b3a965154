"""Turns, their statistics, and the measurements of a quantizer. No test says how fast it is."""

import io
import json

import pytest
import torch
from modulora_conformance.bench import quantizer_bench
from modulora_conformance.bench.quantizer_bench import (
    BenchConfig,
    config_for,
    measure_quantizer,
    measure_speed,
)
from modulora_conformance.bench.timing import Timing, in_turns
from modulora_zoo.healthy import Healthy
from rich.console import Console

from modulora_core.autograd import FrozenWeight, lora_linear
from modulora_core.cli import main
from modulora_core.errors import OptionError, ShapeError, WorkError

SMALL = BenchConfig(shape=(24, 40), rows=(1, 5), seconds=1e-6)


# -- turns


def test_calls_take_turns_after_warming_up():
    made = []
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    timings = in_turns(calls, seconds=60, most=4, warm_up=2)
    assert made == list("aabbcc") + 4 * list("abc")
    assert [len(timings[name].turns) for name in "abc"] == [4, 4, 4]


def test_statistics_of_turns():
    ours, dense = Timing((4.0, 2.0, 9.0)), Timing((2.0, 2.0, 3.0))
    assert (ours.seconds, ours.noise, ours.beside(dense)) == (4.0, 2.0, 2.0)
    # turn by turn: the medians give 2
    assert Timing((8.0, 2.0, 9.0)).beside(Timing((8.0, 4.0, 1.0))) == 1.0
    assert Timing(tuple(float(i) for i in range(30, 0, -1))).low == 4.0
    assert ours.to_json() == {"seconds": 4.0, "low_seconds": 2.0, "noise": 2.0, "turns": 3}


# -- a quantizer


def test_every_comparison_is_made_for_every_dtype_and_number_of_rows():
    reported = []
    found = measure_quantizer(Healthy(), SMALL, lambda *progress: reported.append(progress))
    kinds = [("decode", None), ("forward", 1), ("transposed", 1), ("forward", 5)]
    kinds += [("transposed", 5), ("lora_step", 5)]
    expected = [("pack", "float32", None)]
    expected += [(kind, dtype, rows) for dtype in SMALL.dtypes for kind, rows in kinds]
    assert [(row.kind, row.dtype, row.rows) for row in found.comparisons] == expected
    assert [done for _, done, _ in reported[1::2]] == list(range(1, len(expected) + 1))
    assert {total for _, _, total in reported} == {len(expected)}
    facts = json.loads(json.dumps(found.to_json()))
    assert facts["quantizer"] == "zoo-healthy"
    assert facts["options"] == {"group_size": 32}
    assert len(facts["comparisons"]) == len(expected)
    # two weights a byte; two groups a row, of a scale and a zero in fp16
    values, packed = 24 * 40, 24 * 20 + 24 * 2 * 4
    moved = [row.moved for row in found.comparisons if row.moved]
    assert moved[:2] == 2 * [(4 * values + packed, 8 * values)]
    assert moved[2] == (2 * values + packed, 4 * values)
    assert facts["bits_per_weight"] == pytest.approx(8 * packed / values)
    first = facts["comparisons"][1]
    assert first["share_of_copy"] * moved[1][1] * first["ratio"] == pytest.approx(moved[1][0])
    console = Console(file=io.StringIO(), width=120)
    console.print(found.table())
    printed = console.file.getvalue()
    assert "zoo-healthy (group_size=32), 24 x 40, 5.600 bits per weight" in printed
    assert printed.count("float32") == 7


def test_the_dense_step_computes_the_same_as_the_quantizers():
    draw = torch.Generator().manual_seed(0)
    x, A, B, dY = (
        torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
        for shape in ((5, 40), (8, 40), (24, 8), (5, 24))
    )
    packed = Healthy().pack(torch.randn(24, 40, generator=draw))
    W = Healthy().dequantize_tile(packed, (0, 24), torch.float64)
    ours = lora_linear(x, FrozenWeight(Healthy(), packed), A=A, B=B, scale=quantizer_bench.SCALE)
    dense = quantizer_bench.dense_lora(x, W, A, B)
    torch.testing.assert_close(ours, dense)
    gradients = [torch.autograd.grad(y, (x, A, B), dY) for y in (ours, dense)]
    torch.testing.assert_close(*gradients)


def test_a_failure_names_the_measurement():
    class Failing(Healthy):
        def matmul(self, x, packed, transpose=False):
            if transpose and x.dtype == torch.bfloat16:
                raise ZeroDivisionError("no such\nkernel")
            return super().matmul(x, packed, transpose)

    message = (
        "bench of zoo-healthy: transposed in bfloat16, 1 row: expected it to work, got "
        "ZeroDivisionError: no such kernel; `modulora conformance zoo-healthy`"
    )
    with pytest.raises(WorkError, match=message):
        measure_quantizer(Failing(), SMALL)
    assert measure_speed(type("Broken", (Failing,), {"matmul": None})()) == {}


def test_a_shape_that_does_not_fit_is_refused_before_any_work():
    class Lazy(Healthy):
        def pack(self, weight, calibration=None):
            raise AssertionError

    with pytest.raises(ShapeError, match="in_features 41"):
        measure_quantizer(Lazy(), BenchConfig(shape=(24, 41)))


def test_a_shape_is_read_from_words():
    asked = {"rows": (), "dtypes": (), "device": torch.device("cpu"), "seconds": 1.0}
    assert config_for(Healthy(), shape=None, **asked) == BenchConfig()
    assert config_for(Healthy(), shape="8×16", **asked).shape == (8, 16)
    for wrong in ("4096", "0x8", "8x-8"):
        message = f"--shape: expected OUTxIN, such as 4096x11008, got '{wrong}'"
        with pytest.raises(OptionError, match=message):
            config_for(Healthy(), shape=wrong, **asked)


def test_bench_prints_the_promised_object(toy, capsys):
    words = "--shape 24x40 --rows 1 --rows 5 --seconds 1e-6 --device cpu -o levels=7"
    assert main(["bench", "toy", *words.split(), "--dtype", "float16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {
        "quantizer", "options", "shape", "device", "device_name", "threads", "bits_per_weight",
        "comparisons",
    }  # fmt: skip
    assert (found["options"], found["shape"]) == ({"levels": 7}, [24, 40])
    assert {row["dtype"] for row in found["comparisons"][1:]} == {"float16"}
    for row in found["comparisons"]:
        assert min(row["ours"]["seconds"], row["dense"]["seconds"], row["ratio"]) > 0
        if "share_of_copy" in row:
            assert row["kind"] in ("pack", "decode")
            assert row["bytes_per_second"] > 0
