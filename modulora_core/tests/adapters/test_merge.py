"""What merging says of an adapter that was trained on something else, and what it refuses before it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from modulora_core.adapters.lora import load_adapter, save_adapter
from modulora_core.adapters.merge import merge
from modulora_core.calibration import CalibrationConfig, TuningConfig
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.errors import AdapterError
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import trained
from modulora_core.tests.crude_folders import save_crude
from modulora_core.tests.scaled_quantizer import installed, save_model_with_tokenizer
from modulora_core.tests.tiny_models import save_tiny_model

Pack = Callable[..., tuple[Path, Path]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapter(pack: Pack, tmp_path: Path) -> str:
    """Trained on the tiny Llama that ``verbatim`` packed."""
    save_adapter(trained(load_model(pack("llama")[1])), tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_another_quantization_is_told_as_loading_tells_it(
    adapter: str, pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed = pack("llama", "toy")[1]
    caplog.clear()  # of a model without a tokenizer
    load_adapter(load_model(packed), adapter)
    (loading,) = caplog.messages
    caplog.clear()
    merge(str(packed), tmp_path / "merged", adapter=adapter)
    assert caplog.messages == [loading]
    assert (
        "quantized with verbatim, used on it quantized with toy (levels=127): results may differ"
        in loading
    )


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "phi", "crude"])
def test_nothing_is_told_of_the_base_that_it_was_trained_on(
    family: str, toy: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Norms and biases are stored in float32, and the model is loaded in bfloat16."""
    packed = tmp_path / "packed"
    if family == "crude":
        save_crude(packed)
    else:
        quantize(
            str(save_tiny_model(family, tmp_path / "dense")),
            packed,
            "toy",
            embeddings=Choice("toy"),
        )
    save_adapter(trained(load_model(packed, dtype="bfloat16")), tmp_path / "adapter")
    caplog.clear()  # of a model without a tokenizer
    merge(str(packed), tmp_path / "merged", adapter=str(tmp_path / "adapter"))
    assert caplog.messages == []


def test_norms_that_were_tuned_are_told_as_loading_tells_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_model_with_tokenizer("llama", tmp_path / "source", "float32")
    with installed(tmp_path / "site"):
        for name, tuning in (("tuned", TuningConfig(1, 2e-2)), ("plain", None)):
            text = CalibrationConfig(
                "pydoc[:10%]", samples=6, seq_len=32, batch_size=2, tuning=tuning
            )
            quantize(str(source), tmp_path / name, "scaled", calibration=text)
        save_adapter(trained(load_model(tmp_path / "tuned")), tmp_path / "adapter")
        merge(str(tmp_path / "tuned"), tmp_path / "same", adapter=str(tmp_path / "adapter"))
        assert caplog.messages == []
        load_adapter(load_model(tmp_path / "plain"), tmp_path / "adapter")
        merge(str(tmp_path / "plain"), tmp_path / "other", adapter=str(tmp_path / "adapter"))
    loading, merging = caplog.messages
    assert merging == loading


def test_an_adapter_of_another_architecture_is_refused(
    adapter: str, pack: Pack, tmp_path: Path
) -> None:
    record = Path(adapter) / "modulora.json"
    values = json.loads(record.read_text())
    values["base"]["architecture"] = "sha256:0"
    record.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="other linear layers beside the adapter's"):
        merge(str(pack("llama")[1]), tmp_path / "merged", adapter=adapter)
    assert not (tmp_path / "merged.partial").exists()


def test_a_missing_plugin_is_told_before_anything_is_written(pack: Pack, tmp_path: Path) -> None:
    words = ["merge", str(pack("llama", "toy")[1]), str(tmp_path / "merged")]
    done = subprocess.run(  # where the fixture's plugin isn't on the path
        [sys.executable, "-m", "modulora_core.cli", *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install modulora-toy" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
