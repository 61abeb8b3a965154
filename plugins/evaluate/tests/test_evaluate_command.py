"""The command ``evaluate`` on a small packed model, as a user types it."""

import pytest
import torch
from modulora_evaluate.divergence import divergence

from modulora_core.errors import OptionError
from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.inference.opened import open_to_run
from modulora_core.models.folders import HOLDS_AN_ADAPTER
from modulora_core.tests.adapted_models import trained
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SCOPE = ("--seq-len", 16, "--segments", 3)


@pytest.fixture
def adapter(packed, tmp_path):
    save_adapter(trained(load_model(packed)), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_and_the_model_merged_with_it_have_one_perplexity(
    run, packed, adapter, text, tmp_path
):
    merged = tmp_path / "merged"
    assert run("merge", packed, merged, "--adapter", adapter, "--dtype", "float32")[0] == 0
    models = {"base": (packed,), "tuned": (packed, "--adapter", adapter), "merged": (merged,)}
    measured = {
        name: run("evaluate", *model, "--data", text, *SCOPE)[1] for name, model in models.items()
    }
    assert {"metric", "tokens", "segments", "peak_memory_bytes"} <= measured["base"].keys()
    perplexity = {name: each["perplexity"] for name, each in measured.items()}
    assert perplexity["tuned"] != pytest.approx(perplexity["base"], rel=1e-2)
    assert perplexity["merged"] == pytest.approx(perplexity["tuned"], rel=1e-4)

    words = (packed, "--adapter", adapter, "--against", merged, "--data", text, *SCOPE)
    code, found, notes = run("evaluate", *words)
    assert code == 0
    assert found["metric"] == "divergence"
    assert 0 <= found["kl_divergence"] < 1e-3 * found["kl_of_adapter"]
    assert found["perplexity"] == pytest.approx(perplexity["merged"], rel=1e-4)
    assert found["perplexity_before"] == pytest.approx(perplexity["tuned"], rel=1e-4)
    assert found["perplexity_of_base"] == pytest.approx(perplexity["base"], rel=1e-4)
    assert "warning" not in notes


def test_a_model_without_the_adapter_has_lost_its_effect(run, packed, adapter, text):
    words = (packed, "--adapter", adapter, "--against", packed, "--data", text, *SCOPE)
    code, found, notes = run("evaluate", *words)
    assert code == 0
    assert found["kl_divergence"] == pytest.approx(found["kl_of_adapter"])
    assert "is more than half of the adapter's own effect" in notes


def test_a_mapped_model_has_the_same_perplexity(run, packed, text):
    told = [
        run("evaluate", packed, "--data", text, *SCOPE, "--device", "cpu", *more)[1]["perplexity"]
        for more in ([], ["--mapped"])
    ]
    assert told[0] == told[1]


WRONG = {
    "evaluate {packed} --data {text} --seq-len 100000": "tokens",
    "evaluate {packed} --metric bleu": "--metric: expected one of",
    "evaluate {packed} --metric rouge --prompt x": "expected prompt and completion together",
    "evaluate {packed} --against {packed} --metric rouge": "--against: expected --metric perplex",
    "evaluate {packed} --against {packed} --prompt x --completion y": "--against: expected text",
    "evaluate {packed} --against {text}": "expected",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_input_is_one_sentence_and_exit_code_2(run, packed, text, tmp_path, words):
    places = {"packed": packed, "text": text}
    code, found, errors = run(*(word.format(**places) for word in words.split()))
    assert code == 2, found
    assert WRONG[words] in found["error"]["message"]
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_folder_with_an_adapter_is_no_model(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    code, found, _ = run("evaluate", tmp_path)
    assert code == 2
    assert HOLDS_AN_ADAPTER in found["error"]["message"]


def test_two_models_are_compared_on_segments_that_both_take(packed, tmp_path, toy):
    save_tiny_model("llama", tmp_path / "other")
    first, other = open_to_run(packed), open_to_run(tmp_path / "other")
    with pytest.raises(OptionError, match=r"expected the .* tokens of .*; give two forms of the"):
        divergence(first, other, torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(OptionError, match="seq_len 100000: expected at most the window of"):
        divergence(first, first, torch.zeros(1, 100_000, dtype=torch.int64))
