"""Turns, their statistics, and what is measured of a quantizer. No test says how fast anything is."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from modulora_conformance.bench import quantizer_bench
from modulora_conformance.bench import timing as bench
from modulora_conformance.bench.quantizer_bench import BenchConfig, Comparison, measure_quantizer
from modulora_conformance.bench.timing import Timing, cold_copies, in_turns, rotating
from torch import Tensor

from modulora_core.devices import clock as device_clock
from modulora_core.autograd import lora_linear
from modulora_core.errors import OptionError, ShapeError, WorkError

SMALL: dict[str, Any] = {"shape": (24, 40), "rows": (1, 5), "seconds": 1e-6}


# --- turns -----------------------------------------------------------------------------------------------


def test_calls_take_turns_after_warming_up() -> None:
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    timings = in_turns(calls, seconds=60, most=4, warm_up=2)  # type: ignore[arg-type]  # a lambda with a default
    assert made == list("aabbcc") + 4 * list("abc")
    assert list(timings) == list("abc")
    assert {len(timing.turns) for timing in timings.values()} == {4}


def test_a_call_is_timed_alone() -> None:
    timings = in_turns(
        {"long": lambda: time.sleep(0.02), "short": lambda: None}, seconds=1e-9, least=3
    )
    assert (
        len(timings["long"].turns) == 3
    )  # the least, since one turn takes longer than the seconds
    assert min(timings["long"].turns) >= 0.02  # time.sleep never sleeps less
    assert timings["short"].low < 0.02
    assert timings["long"].beside(timings["short"]) > 1


def test_turns_end_with_the_seconds() -> None:
    start = time.perf_counter()
    timings = in_turns({"a": lambda: time.sleep(0.005)}, seconds=0.05, least=1, most=10**6)
    assert time.perf_counter() - start >= 0.05
    assert 1 <= len(timings["a"].turns) <= 10


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"least": 0}, {"least": 5, "most": 4}])
def test_turns_that_can_not_be_taken_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="in_turns: expected calls, seconds > 0"):
        in_turns({"a": lambda: None}, **wrong)
    with pytest.raises(OptionError, match="got 0 calls"):
        in_turns({})


def test_statistics_of_turns() -> None:
    ours, dense = Timing((4.0, 2.0, 9.0)), Timing((2.0, 2.0, 3.0))
    assert ours.seconds == 4.0
    assert ours.noise == 2.0
    assert (
        ours.beside(dense) == 2.0
    )  # of 2, 1 and 3: turn by turn, not 4.0 / 2.0 of the medians by chance
    assert (
        Timing((8.0, 2.0, 9.0)).beside(Timing((8.0, 4.0, 1.0))) == 1.0
    )  # where the medians give 2
    assert (
        Timing(tuple(float(i) for i in range(30, 0, -1))).low == 4.0
    )  # a tenth of the 30 is below it
    assert ours.to_json() == {"seconds": 4.0, "low_seconds": 2.0, "noise": 2.0, "turns": 3}


def test_rotating_takes_the_next_each_time() -> None:
    taken: list[int] = []
    call = rotating(taken.append, [1, 2, 3])
    for _ in range(5):
        call()
    assert taken == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("nbytes", [1, 10**6, 10**8, 10**12])
def test_operands_that_rotate_are_more_than_a_cache_and_not_much_more(nbytes: int) -> None:
    count = cold_copies(nbytes)
    enough = min(2 * bench._last_cache_bytes(), bench.MOST_COLD)
    assert count in (2, bench.MOST_COPIES) or enough <= count * nbytes < enough + nbytes


def test_the_cache_is_read_in_the_units_of_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(bench, "_CACHES", tmp_path)
    assert bench._last_cache_bytes() == bench.LAST_CACHE
    for i, size in enumerate(("48K\n", "2M\n", "odd\n")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size)
    assert bench._last_cache_bytes() == 2 * 2**20


def test_on_cuda_the_device_times_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one runs in examples/benchmarks/gpu.py; this holds the order, and that CUDA's events count milliseconds."""
    done: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, stop: Event) -> float:
            return 250.0

    class Cold:
        def zero_(self) -> None:
            done.append("fill")

    slept: list[int] = []

    def sleep(cycles: int) -> None:
        done.append("sleep")
        slept.append(cycles)

    def call() -> None:
        done.append("call")

    # before and after each of the four calls: they take the host 1, 1.5, 0.5 and 1 ms
    now = iter([0.0, 1e-3, 1.0, 1.0 + 1.5e-3, 2.0, 2.0 + 5e-4, 3.0, 3.0 + 1e-3])
    monkeypatch.setattr(device_clock, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: Cold())
    timings = in_turns({"a": call}, seconds=1e-9, least=3, warm_up=1, device="cuda")
    assert done == 4 * ["fill", "sleep", "event", "call", "event", "wait"]
    assert timings["a"].turns == (0.25, 0.25, 0.25)
    # at first nobody knows what the call takes the host; then the device waits for twice what it took the last time
    assert [cycles / 2e9 for cycles in slept] == pytest.approx(
        [device_clock.LEAST_AHEAD, 2e-3, 3e-3, 1e-3], rel=1e-6
    )


def test_what_takes_the_host_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    event = SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda _: 0.0
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    seconds, _ = device_clock.seconds_of(
        lambda: None, torch.device("cuda"), device_clock.MOST_AHEAD
    )
    assert slept == [int(device_clock.LEAST_AHEAD * 2e9)]
    assert seconds == device_clock.TICK


# --- a quantizer -----------------------------------------------------------------------------------------


def test_every_comparison_is_made_for_every_dtype_and_number_of_rows(toy: ModuleType) -> None:
    told: list[tuple[int, int, str]] = []
    found = measure_quantizer(
        toy.Toy(), BenchConfig(**SMALL), lambda *progress: told.append(progress)
    )
    products = [
        ("forward", 1),
        ("transposed", 1),
        ("forward", 5),
        ("transposed", 5),
        ("lora_step", 5),
    ]
    of_a_dtype = [("decode", None), *products]
    expected = [("pack", "float32", None)]
    expected += [
        (kind, dtype, rows) for dtype in ("float32", "bfloat16") for kind, rows in of_a_dtype
    ]
    assert [(row.kind, row.dtype, row.rows) for row in found.comparisons] == expected
    assert [done for done, _, _ in told[1::2]] == list(range(1, len(expected) + 1))
    assert {total for _, total, _ in told} == {len(expected)}
    assert json.loads(json.dumps(found.to_json()))["bits_per_weight"] == found.bits_per_weight


def test_bytes_that_are_moved_count_packed_and_dense(toy: ModuleType) -> None:
    found = measure_quantizer(toy.Toy(), BenchConfig(**SMALL))
    values, packed = 24 * 40, 24 * 40 + 24 * 4  # a byte a weight, fp32 scales
    moved = {
        (row.kind, row.dtype): (row.moved, row.dense_moved)
        for row in found.comparisons
        if row.moved
    }
    assert moved == {
        ("pack", "float32"): (4 * values + packed, 8 * values),
        ("decode", "float32"): (4 * values + packed, 8 * values),
        ("decode", "bfloat16"): (2 * values + packed, 4 * values),
    }
    assert found.bits_per_weight == pytest.approx(8 * packed / values)


def test_a_copy_is_a_whole_share_of_itself() -> None:
    turns = Timing((0.5, 0.5, 0.25))
    row = Comparison(
        kind="decode",
        dtype="float32",
        rows=None,
        ours=turns,
        dense=turns,
        moved=100,
        dense_moved=100,
    )
    assert row.share == 1.0
    assert row.bandwidth == 200.0


def test_the_dense_step_computes_what_the_quantizers_does(toy: ModuleType) -> None:
    """Else the two sides of the ratio would be different work."""
    generator = torch.Generator().manual_seed(0)
    x, A, B, dY = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((5, 40), (8, 40), (24, 8), (5, 24))
    )
    quantizer = toy.Verbatim()
    packed = quantizer.pack(torch.randn(24, 40, generator=generator))
    weight = quantizer.dequantize_tile(packed, (0, 24), torch.float64)
    ours = lora_linear(x, quantizer, packed, A=A, B=B, scale=quantizer_bench.SCALE)
    dense = quantizer_bench._dense_lora(x, weight, A, B)
    gradients = [torch.autograd.grad(y, (x, A, B), dY) for y in (ours, dense)]
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(*gradients)


def test_calibration_that_is_wanted_is_an_identity(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Calibrated(toy.Toy):  # type: ignore[name-defined,misc]  # a module made by a fixture
        def pack(self, weight: Tensor, calibration: Any = None) -> Any:
            seen.append(calibration)
            return super().pack(weight)

    measure_quantizer(Calibrated(), BenchConfig(**SMALL))
    assert set(seen) == {None}
    seen.clear()
    for wanted in ("optional", "required"):
        monkeypatch.setattr(Calibrated, "spec", toy.Toy.spec.model_copy(update={"calibration": wanted}))
        measure_quantizer(Calibrated(), BenchConfig(**SMALL))
    assert len(seen) == 4  # a small one that compiles, and the one that is timed
    assert all(torch.equal(c.hessian, torch.eye(len(c.hessian))) for c in seen)
    assert {len(c.hessian) for c in seen} == {2, 40}


def test_a_failure_says_at_what(toy: ModuleType) -> None:
    class Failing(toy.Toy):  # type: ignore[name-defined,misc]
        def matmul(self, x: Tensor, packed: Any, transpose: bool = False) -> Tensor:
            if transpose and x.dtype == torch.bfloat16:
                raise ZeroDivisionError("no such\nkernel")
            return super().matmul(x, packed, transpose)  # type: ignore[no-any-return]

    with pytest.raises(WorkError, match="bench of toy: transposed in bfloat16, 1 row: expected it to work, got "
                                        "ZeroDivisionError: no such kernel; `modulora conformance toy`"):  # fmt: skip
        measure_quantizer(Failing(), BenchConfig(**SMALL))


def test_a_shape_that_does_not_fit_is_refused_before_any_work(toy: ModuleType) -> None:
    class Picky(toy.Toy):  # type: ignore[name-defined,misc]
        def check_shape(self, shape: tuple[int, int]) -> None:
            if shape[1] % 64:
                raise ShapeError(f"toy: in_features {shape[1]} is not a multiple of 64")

        def pack(self, weight: Tensor, calibration: Any = None) -> Any:
            assert weight.shape[1] % 64 == 0
            return super().pack(weight)

    with pytest.raises(ShapeError, match="in_features 40"):
        measure_quantizer(Picky(), BenchConfig(**SMALL))
    measure_quantizer(Picky(), BenchConfig(**SMALL | {"shape": (3, 64)}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (0, 8)}, "shape: expected positive sizes OUTxIN, got 0x8"),
        ({"rows": ()}, "rows: expected positive"),
        ({"rows": (1, 0)}, "rows: expected positive"),
        ({"seconds": 0.0}, "seconds: expected more than 0, got 0"),
        ({"seconds": float("nan")}, "seconds: expected more than 0, got nan"),
        (
            {"dtypes": ("float32", "int4")},
            "dtype: expected some of float32, bfloat16, float16, got int4",
        ),
        ({"dtypes": ()}, "got none"),
    ],
)
def test_a_wrong_request_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BenchConfig(**wrong)
