"""The benchmarks of ``examples/benchmarks``, small and quick: that they measure, and say what they don't. Never how fast."""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from modulora_core.tests.adapted_models import save_llama_with_tokenizer

pytest.importorskip(
    "modulora_nf4", reason="something of ours to measure: pip install ./plugins/nf4"
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("turns", "methods", "peers", "report", "models", "layer", "training", "decoding", "memory", "quantization",
           "few_rows")  # fmt: skip

Main = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def module() -> Iterator[Callable[[str], ModuleType]]:
    """A benchmark's module by name: they import each other from their own folder, as scripts do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in MODULES:
        sys.modules.pop(name, None)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a tiny model, and of a folder that the benchmarks share."""
    root = tmp_path_factory.mktemp("models")
    save_llama_with_tokenizer(root / "llama")
    return ["--model", str(root / "llama"), "--folder", str(root / "made")]


@pytest.fixture
def run(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Main:  # fmt: skip
    """Run a benchmark in this process with nf4, one peer that isn't installed, and the flags; give its JSON and what it printed."""
    monkeypatch.setattr(
        module("peers").Bitsandbytes, "distributions", ("modulora-no-such-library",)
    )

    def call(name: str, *flags: str) -> dict[str, Any]:
        file = tmp_path / f"{name}.json"
        words = [
            "-q",
            "nf4",
            "-p",
            "bitsandbytes-nf4",
            "--quick",
            "--one-process",
            "--json",
            str(file),
            *flags,
        ]
        assert module(name).main(words) == 0
        return {**json.loads(file.read_text()), "printed": capsys.readouterr().out}

    return call


def check(told: dict[str, Any], benchmark: str) -> None:
    """What every benchmark's JSON has, ours among it, and the peer that isn't there told by name."""
    assert told["benchmark"] == benchmark
    assert {"cpu", "threads", "load", "versions", "instructions"} <= told["environment"].keys()
    assert "torch" in told["environment"]["versions"]
    assert "nf4" in {result["method"] for result in told["results"]}
    reasons = {line["method"]: line["reason"] for line in told["not_measured"]}
    assert reasons["bitsandbytes-nf4"].startswith("modulora-no-such-library isn't installed")
    assert f"bitsandbytes-nf4: not measured: {reasons['bitsandbytes-nf4']}" in told["printed"]


def check_turns(results: list[dict[str, Any]], base: dict[str, Any]) -> None:
    """Each ratio is a median over turns: it lies among the turns' ratios, and is 1 for the base itself."""
    assert base["ratio"] == base["low_ratio"] == 1
    for result in results:
        assert result["seconds"] == statistics.median(result["samples"])
        assert result["low_seconds"] == min(
            result["samples"]
        )  # the tenth percentile of fewer than ten
        ratios = [mine / its for mine, its in zip(result["samples"], base["samples"], strict=True)]
        assert min(ratios) <= result["ratio"] <= max(ratios)
        assert math.isfinite(result["low_ratio"])


def base_of(results: list[dict[str, Any]], method: str = "dense") -> dict[str, Any]:
    return next(r for r in results if r["method"] == method and r["dtype"] == "float32")


def test_layer_tells_every_case_of_every_method(run: Main, tmp_path: Path) -> None:
    told = run("layer", "--rows", "1", "5", "--tiles", "16")
    check(told, "layer")
    results = told["results"]
    cases = {(r["passes"], r["rows"]) for r in results}
    assert cases == {
        (passes, rows) for passes in ("forward", "forward + backward") for rows in (1, 5)
    }
    for passes, rows in cases:
        turns = [r for r in results if (r["passes"], r["rows"]) == (passes, rows)]
        names = {"dense", "nf4", "nf4, tiles of 16 KiB"}
        assert {(r["method"], r["dtype"]) for r in turns} == {
            (n, t) for n in names for t in ("float32", "bfloat16")
        }
        check_turns(turns, base_of(turns))
    # NF4's error on normal values is 0.097 (its promise), that of a dense bf16 weight at most 2^-8; both with room for a small sample
    assert all(0.05 < r["relative_error"] < 0.15 for r in results if r["method"].startswith("nf4"))
    assert all(r["relative_error"] < 0.01 for r in results if r["method"] == "dense")
    # 128 × 128 weights: 4 bits each and an fp32 scale for 64
    assert {r["bytes"] for r in results if r["method"] == "nf4" and "bytes" in r} == {
        128 * 128 // 2 + 128 * 128 // 64 * 4
    }


def test_few_rows_compares_both_ways_and_leaves_the_limit_alone(
    module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from modulora_core.kernels import choices, quantizer
    from modulora_core.kernels.cpu import amx

    before, given = choices.FEW_ROWS, []
    tiled = quantizer.tiled_matmul
    monkeypatch.setattr(
        quantizer, "tiled_matmul", lambda *all_: given.append(len(all_[0])) or tiled(*all_)
    )
    words = ["-q", "nf4", "nosuch", "--rows", "2", "40", "--shape", "64x128", "--seconds", "0.01"]
    assert module("few_rows").main(words) == 0
    assert set(given) == {2, 40}  # by tiles, of either number
    assert before == choices.FEW_ROWS
    told = capsys.readouterr()
    assert told.err.startswith("nosuch: not measured: quantizer 'nosuch' isn't installed")
    rows = [line.split("|")[1:-1] for line in told.out.splitlines() if line.startswith("| nf4")]
    assert [int(row[1]) for row in rows] == [2, 40]
    ways = 2 * ["fused", "blocks", "amx", "tiles"]
    for row in rows:
        for way, cell in zip(ways, row[2:], strict=True):
            # not in every processor
            assert cell.strip() == "–" if way == "amx" and not amx.available() else float(cell) > 0


def test_the_flags_that_our_documents_use_still_work(run: Main) -> None:
    told = run(
        "layer",
        "-q",
        "nf4:double_quant=true",
        "--forward",
        "--size",
        "64",
        "--rows",
        "3",
        "--repeats",
        "2",
        "--peers",
    )
    assert {r["method"] for r in told["results"]} == {"dense", "nf4:double_quant=true"}
    assert {(r["passes"], r["rows"], r["turns"]) for r in told["results"]} == {("forward", 3, 2)}


def test_training_steps_are_compared(run: Main, models: list[str]) -> None:
    told = run("training", *models)
    check(told, "training")
    check_turns(told["results"], base_of(told["results"]))
    dense, ours = base_of(told["results"]), base_of(told["results"], "nf4")
    assert ours["trained"] == dense["trained"]  # PEFT's adapter and ours have the same parameters
    # the same batch: a 4-bit model of random weights is about as wrong as the dense one, near log(600) or above it
    assert ours["loss"] == pytest.approx(dense["loss"], rel=0.1)
    assert min(dense["peak_memory_bytes"], ours["peak_memory_bytes"]) > 10 * 2**20


def test_ours_are_measured_again_with_a_packed_head_and_some_with_checkpointing(
    run: Main, models: list[str]
) -> None:
    told = run(
        "training",
        *models,
        "--quantize-head",
        "int8",
        "--gradient-checkpointing",
        "nf4, head int8",
        "--keep-products",
        "rounded",
        "--peers",
    )
    losses = {result["method"]: result["loss"] for result in told["results"]}
    assert losses.keys() == {"dense", "nf4", "nf4, head int8"}
    assert losses["nf4, head int8"] != losses["nf4"]  # the head has other values
    assert losses["nf4, head int8"] == pytest.approx(losses["nf4"], rel=0.1)
    with pytest.raises(SystemExit, match=r"'nf5': expected one of dense, nf4"):
        run("training", *models, "--gradient-checkpointing", "nf5")
    with pytest.raises(SystemExit, match="expected --gradient-checkpointing beside it, got none"):
        run("training", *models, "--keep-products", "rounded")


def test_decoding_rates_are_compared_in_both_dtypes(run: Main, models: list[str]) -> None:
    told = run("decoding", *models, "--length", "5")
    check(told, "decoding")
    check_turns(told["results"], base_of(told["results"]))
    assert {r["dtype"] for r in told["results"]} == {"float32", "bfloat16"}
    assert {(r["new_tokens"], len(r["ids"])) for r in told["results"]} == {(5, 5)}


def test_packing_is_measured_beside_a_copy(run: Main) -> None:
    told = run("quantization")
    check(told, "quantization")
    check_turns(told["results"], base_of(told["results"], "copy"))
    ours = base_of(told["results"], "nf4")
    assert ours["bits_per_weight"] == 4.5
    assert ours["gigabytes_per_second"] * ours["seconds"] == pytest.approx(
        ours["source_bytes"] / 1e9
    )


def test_quantizing_a_whole_model_is_measured(run: Main, models: list[str]) -> None:
    told = run("quantization", *models)
    check(told, "quantization")
    (result,) = told["results"]
    assert result["seconds"] > 0
    assert result["low_seconds"] == min(result["samples"])


def test_memory_has_the_three_peaks_and_their_ratios(run: Main, models: list[str]) -> None:
    told = run("memory", *models)
    check(told, "memory")
    dense = base_of(told["results"])
    for result in told["results"]:
        for column in ("loading_bytes", "training_bytes", "decoding_bytes"):
            assert result["ratios"][column] == result[column] / dense[column]


def test_a_picture_is_drawn(run: Main, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures take it: pip install matplotlib")
    file = tmp_path / "layer.svg"
    run("layer", "--rows", "1", "--forward", "--plot", str(file))
    assert file.read_text().count("nf4") > 0


def test_each_method_has_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "layer.json"
    words = [
        "-q",
        "nf4",
        "--peers",
        "--quick",
        "--forward",
        "--rows",
        "2",
        "--dtypes",
        "float32",
        "--threads",
        "1",
        "--json",
        str(file),
    ]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "layer.py"), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    assert [r["method"] for r in results] == ["dense", "nf4"]
    check_turns(results, base_of(results))
    assert done.stdout.count("| nf4 ") == 1


def test_a_process_that_dies_or_refuses_is_a_reason(module: Callable[[str], ModuleType]) -> None:
    turns = module("turns")
    with pytest.raises(turns.NotMeasuredError, match="exit code 3"):
        turns.Process(os._exit, 3)
    with pytest.raises(turns.NotMeasuredError, match="ValueError: invalid literal"):
        turns.Process(int, "four")


def test_processes_that_start_at_once_leave_the_standard_streams_as_they_were(
    module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = module("turns")
    context = SimpleNamespace(
        Pipe=multiprocessing.Pipe, Process=lambda **_: SimpleNamespace(start=lambda: time.sleep(random.random() / 100))
    )  # fmt: skip
    monkeypatch.setattr(turns.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(turns.Process, "_answer", lambda _: None)
    before = [os.fstat(stream) for stream in (1, 2)]
    saved = os.dup(1), os.dup(2)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(turns.Process, [int] * 32))
        after = [os.fstat(stream) for stream in (1, 2)]
    finally:
        for kept, stream in zip(saved, (1, 2), strict=True):
            os.dup2(kept, stream)
            os.close(kept)
    assert [(stat.st_dev, stat.st_ino) for stat in after] == [
        (stat.st_dev, stat.st_ino) for stat in before
    ]


def test_a_peer_that_nobody_knows_is_refused(module: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit, match=r"peer 'bitsandbits': expected one of bitsandbytes-nf4, "):
        module("layer").main(["--quick", "-q", "nf4", "-p", "bitsandbits"])


def test_a_wrong_result_is_not_measured(module: Callable[[str], ModuleType]) -> None:
    class Wrong(module("methods").Dense):  # type: ignore[misc]  # imported at run time
        def layer(
            self, weight: torch.Tensor, dtype: torch.dtype, *, training: bool = False
        ) -> torch.nn.Module:
            return super().layer(-weight, dtype)  # type: ignore[no-any-return]

    layer = module("layer")
    job = module("turns").Here(layer.LayerJob, Wrong(), (16, 16), 0.001)
    with pytest.raises(module("turns").NotMeasuredError, match=r"off by 2\.00"):
        job.ask("prepare", layer.Case("forward", 1, "float32"))
