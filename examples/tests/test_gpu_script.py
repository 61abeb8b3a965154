"""examples/benchmarks/gpu.py without a GPU: what it refuses, that it catches wrong values, and all of its sections on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from modulora_core.tests.conftest import install_package

FOLDER = Path(__file__).parents[1] / "benchmarks"

needs_kit = pytest.mark.skipif(
    importlib.util.find_spec("modulora_conformance") is None,
    reason="its bounds are the conformance kit's",
)

SPEC = """
    from modulora_core.hookspecs import hookimpl
    from modulora_core.spec import Promise, QuantizerSpec

    PROMISE = Promise(bits_per_weight=32, gaussian=0, heavy_tailed=0, outlier_columns=0, constant=0)
    SPECS = [QuantizerSpec(name=name, summary="Keeps fp32", location=f"modulora_kept.quantizer:{cls}", protocol=1, bits=(32,),
                           devices=devices, promises=(PROMISE,))
             for name, cls, devices in (
                 ("right", "Right", ("cpu", "cuda")), ("wrong", "Wrong", ("cpu", "cuda")), ("plain", "Plain", ("cpu",)))]

    @hookimpl
    def modulora_quantizers():
        return SPECS
"""

QUANTIZERS = """
    import os

    import torch
    from modulora_core.spec import PackedWeight, Quantizer, check_rows
    from modulora_kept import SPECS

    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as a kernel finds out

    class Plain(Quantizer):
        spec = SPECS[2]

        def pack(self, weight, calibration=None):
            return PackedWeight(self.spec.name, 1, tuple(weight.shape), {"values": weight.float().contiguous().clone()})

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
                y[-1, -1] += 0.5  # as a mask that is off by one
            return y
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, on the path, installs three quantizers."""
    root = tmp_path_factory.mktemp("kept-site")
    files = {"__init__.py": SPEC, "quantizer.py": QUANTIZERS}
    install_package(root, "modulora-kept", "kept", "modulora_kept", files)
    return root


@pytest.fixture
def gpu(site: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with those quantizers installed."""
    for folder in (site, FOLDER):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module("gpu")


def run(site: Path, *words: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "gpu.py"), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@needs_kit
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU, on which it would run everything"
)
def test_without_a_gpu_it_says_so_in_a_sentence(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: expected a GPU that torch can use, found none")
    assert printed.err.count("\n") == 1


@needs_kit
def test_an_unknown_quantizer_is_refused_before_any_work(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["-q", "rigth", "--interpret"]) == 2
    assert "did you mean 'right'" in capsys.readouterr().err


@needs_kit
def test_without_triton_nothing_is_interpreted(
    gpu: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert gpu.main(["-q", "right", "--interpret"]) == 2
    assert capsys.readouterr().err.startswith("error: --interpret: expected triton, ")


@needs_kit
def test_interpreted_values_are_compared_with_those_that_are_not(
    site: Path, tmp_path: Path
) -> None:
    ran = run(
        site, "--interpret", "-q", "right", "wrong", "plain", "--json", tmp_path / "found.json"
    )
    assert ran.returncode == 1, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == ["wrong"]
    assert ran.stdout.rstrip().endswith("wrong values: wrong")
    failed = [row for row in found["parity"]["wrong"] if not row["passed"]]
    assert {(row["check"], row["dtype"]) for row in failed} == {("y Ŵ, 17 rows", "bfloat16")}
    assert {tuple(row["shape"]) for row in failed} == {(1, 1), (5, 3), (17, 66)}
    assert all(row["passed"] for row in found["parity"]["right"])
    assert "plain" not in found["parity"]
    (left_out,) = found["not_measured"]
    assert (left_out["method"], left_out["section"]) == ("plain", "interpret")


@needs_kit
def test_every_section_runs_and_a_peer_that_is_missing_is_told(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in ("bitsandbytes", "peft"):
        monkeypatch.setitem(sys.modules, module, None)  # as Python marks what can't be imported
    file = tmp_path / "found.json"
    words = ["--device", "cpu", "--one-process", "--quick", "-q", "right", "--json", str(file)]
    assert gpu.main(words) == 0
    found = json.loads(file.read_text())
    assert all(row["passed"] for row in found["parity"]["right"])
    assert {tuple(row["shape"]) for row in found["parity"]["right"]} == {
        (3, 5),
        (37, 52),
        (128, 128),
    }
    layer = found["layers"]["right"]
    assert layer["shape"] == [128, 128]
    assert {row["kind"] for row in layer["comparisons"]} == {
        "decode",
        "forward",
        "transposed",
        "lora_step",
    }
    assert found["models"].keys() == {"dense", "right"}
    for model in found["models"].values():
        assert (
            min(model["step"]["seconds"], model["peak_memory_bytes"], model["tokens_per_second"])
            > 0
        )
    # the packed weights are other ones, of the same spread: a loss near that of guessing
    assert found["models"]["right"]["loss"] == pytest.approx(
        found["models"]["dense"]["loss"], rel=0.1
    )
    (peer,) = found["not_measured"]
    assert (peer["method"], peer["section"]) == ("bitsandbytes-nf4", "start")
    printed = capsys.readouterr().out
    assert "right  46 of 46" in printed
    assert peer["reason"] in printed


@needs_kit
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed"
)
def test_the_peers_layers_are_bitsandbytes_own(gpu: ModuleType) -> None:
    """PEFT must have put its adapters on quantized layers, and the kernels that are measured must be those of a layer."""
    from bitsandbytes.nn import Linear4bit

    jobs, models = (sys.modules[name] for name in ("gpu_jobs", "gpu_models"))
    model: Any = models.bitsandbytes_model(gpu.QUICK, torch.device("cpu"))
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert len(layers) == 7 * gpu.QUICK.layers
    assert all(layer.weight.quant_state is not None for layer in layers.values())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(layers)
    assert all("lora_" in name for name in trained)

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    layer = Linear4bit(
        64, 24, bias=False, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32
    )
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    quantizer = jobs._BitsAndBytes()
    packed = quantizer.pack(weight)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(quantizer.matmul(x, packed), layer(x))
    W = quantizer.dequantize_tile(packed, (0, 24), torch.float32)
    torch.testing.assert_close(W[5:9], quantizer.dequantize_tile(packed, (5, 9), torch.float32))
    assert (
        float((W - weight).norm() / weight.norm()) < 0.12
    )  # 4 bits: it isn't another weight, nor the weight itself
    assert float((W - weight).norm()) > 0
