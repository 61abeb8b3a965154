"""benchmarks/gpu.py without a GPU: it refuses, it catches wrong values, and it runs on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from modulora_core.tests.conftest import install_package

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"

SPEC = """
    from modulora_core.hookspecs import hookimpl
    from modulora_core.spec import Promise, QuantizerSpec

    PROMISE = Promise(bits_per_weight=32, gaussian=0, heavy_tailed=0, outlier_columns=0, constant=0)
    SPECS = [
        QuantizerSpec(name=name, summary="Keeps fp32", location=f"modulora_kept.quantizer:{cls}",
                      protocol=2, bits=(32,), devices=devices, promises=(PROMISE,))
        for name, cls, devices in (("right", "Right", ("cpu", "cuda")),
                                   ("wrong", "Wrong", ("cpu", "cuda")),
                                   ("plain", "Plain", ("cpu",)))
    ]

    @hookimpl
    def modulora_quantizers():
        return SPECS
"""

QUANTIZERS = """
    import os

    import torch
    from modulora_core.spec import PackedWeight, Quantizer, check_rows
    from modulora_kept import SPECS

    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

    class Plain(Quantizer):
        spec = SPECS[2]

        def pack(self, weight, calibration=None):
            values = weight.float().contiguous().clone()
            return PackedWeight(self.spec.name, 1, tuple(weight.shape), {"values": values})

        def dequantize_tile(self, packed, rows, dtype):
            check_rows(packed, rows)
            return packed.tensors["values"][rows[0] : rows[1]].to(dtype, copy=True)

    class Right(Plain):
        spec = SPECS[0]

    class Wrong(Plain):
        spec = SPECS[1]

        def matmul(self, x, packed, transpose=False):
            y = super().matmul(x, packed, transpose)
            if INTERPRETED and transpose and x.dtype == torch.bfloat16 and len(x) > 4:
                y[-1, -1] += 0.5  # as a wrong mask does
            return y
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that installs three quantizers if it is on the path."""
    root = tmp_path_factory.mktemp("kept-site")
    files = {"__init__.py": SPEC, "quantizer.py": QUANTIZERS}
    install_package(root, "modulora-kept", "kept", "modulora_kept", files)
    return root


@pytest.fixture
def gpu(
    site: Path, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """The script as a module, with those quantizers installed."""
    monkeypatch.syspath_prepend(site)
    return module("gpu")


@pytest.mark.slow
def test_interpreted_values_are_compared_with_the_others(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["--interpret", "-q", "right", "wrong", "plain", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout.rstrip().endswith("wrong values: wrong")
    found: dict[str, Any] = json.loads(file.read_text())
    failed = [check for check in found["values"]["wrong"] if not check["passed"]]
    assert {(check["check"], check["dtype"]) for check in failed} == {("y Ŵ, 17 rows", "bfloat16")}
    assert {tuple(check["shape"]) for check in failed} == {(1, 1), (3, 5), (37, 52)}
    assert all(check["passed"] for check in found["values"]["right"])
    assert [line["method"] for line in found["not_measured"]] == ["plain"]


def test_every_section_runs_and_a_missing_peer_is_named(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft", reason="the dense model's adapter: pip install peft")
    monkeypatch.setattr(gpu.Bitsandbytes, "distributions", ("modulora-no-such-library",))
    file = tmp_path / "found.json"
    words = ["--device", "cpu", "--one-process", "--quick", "-q", "right", "--json", str(file)]
    assert gpu.main(words) == 0
    found = json.loads(file.read_text())
    shapes = {tuple(check["shape"]) for check in found["values"]["right"]}
    assert shapes == {(1, 1), (3, 5), (37, 52), (128, 128)}
    assert all(check["passed"] for check in found["values"]["right"])
    cases = {(each["passes"], each["rows"], each["dtype"]) for each in found["layers"]["right"]}
    assert len(cases) == 2 * 3 * 3
    assert found["models"].keys() == {"dense", "right"}
    for model in found["models"].values():
        assert model["step"]["seconds"] > 0
        assert min(model["peak_memory_bytes"], model["tokens_per_second"]) > 0
    # random weights of another spread, with a loss near that of guessing
    losses = [model["loss"] for model in found["models"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    (peer,) = found["not_measured"]
    assert peer["reason"].startswith("modulora-no-such-library isn't installed")
    assert "wrong values: none" in capsys.readouterr().out
