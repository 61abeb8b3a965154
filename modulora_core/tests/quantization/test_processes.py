"""Several processes divide calibration and packing, and give the checkpoint of one process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modulora_core.calibration import CalibrationConfig, TuningConfig, load_calibration
from modulora_core.data.sources import pydoc_text
from modulora_core.errors import OptionError
from modulora_core.quantization import quantize as module
from modulora_core.tests import width_quantizer
from modulora_core.tests.processes import quantized, run_in_processes
from modulora_core.tests.scaled_quantizer import save_model_with_tokenizer
from modulora_core.tests.tiny_tokenizer import make_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory):
    with width_quantizer.installed(tmp_path_factory.mktemp("site")):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("weighting", [None, "loss"])
@pytest.mark.parametrize("architecture", ["llama-biased", "mixtral"])
def test_the_checkpoint_is_that_of_one_process(architecture, weighting, tmp_path):
    model = Path(save_model_with_tokenizer(architecture, tmp_path / "dense", "float32"))
    text = tmp_path / "text.txt"
    text.write_text(pydoc_text()[:3000])
    unreached = quantized(model, tmp_path / "one", "heeding", text, weighting)
    for number in (2, 4):  # of 5 samples, so that shares differ
        out = tmp_path / str(number)
        found = run_in_processes(number, quantized, model, out, "heeding", text, weighting)
        assert found == [unreached] * number
        assert {file.name for file in out.iterdir()} == {
            file.name for file in (tmp_path / "one").iterdir()
        }
        assert (out / "config.json").read_bytes() == (tmp_path / "one/config.json").read_bytes()
        values = load_file(out / "model.safetensors")
        for name, tensor in load_file(tmp_path / "one" / "model.safetensors").items():
            torch.testing.assert_close(values[name], tensor, rtol=1e-5, atol=1e-5)


def test_work_that_processes_cannot_divide_is_refused(monkeypatch):
    tokenizer = make_tokenizer()
    config = CalibrationConfig("pydoc[:10%]", samples=3, seq_len=16, tuning=TuningConfig())
    tuned = load_calibration(config, tokenizer, seed=0)
    plain = load_calibration(CalibrationConfig("pydoc[:10%]", 3, 16), tokenizer, seed=0)
    module._check_processes(tuned)
    monkeypatch.setattr(module, "world_size", lambda: 4)
    with pytest.raises(OptionError, match="tuning: expected one process, got 4"):
        module._check_processes(tuned)
    with pytest.raises(OptionError, match="a sample for each of 4 processes, got 3"):
        module._check_processes(plain)
