"""The paper's tasks run as they are configured, on a few rows of the same columns."""

import json
from pathlib import Path

import pytest

from modulora_core.cli import main
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.tiny_tokenizer import write_jsonl
from modulora_core.training.config import FinetuneConfig

pytest.importorskip("modulora_nf4", reason="pip install ./plugins/nf4")

PAPER = Path(__file__).parents[1] / "paper"
ROWS = {
    "mnli": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0},
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": "contradiction", "idx": 1},
    ],
    "samsum": [{"id": "1", "dialogue": "A: Tea?\r\nB: Yes.", "summary": "B wants tea."}],
    "alpaca": [
        {"instruction": "Say yes.", "input": "", "output": "yes", "text": "Below is ..."},
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "text": "Below is ..."},
    ],
    "bbh": [{"input": "not ( True ) is", "target": "False"}],
}
MEASURED = {
    "mnli": ("accuracy", "accuracy"),
    "samsum": ("rouge", "rougeL"),
    "alpaca": ("rouge", "rouge1"),
    "bbh": ("exact-match", "exact_match"),
}
BATCH = {"mnli": 256, "samsum": 128, "alpaca": 128, "bbh": 16}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    save_llama_with_tokenizer(folder / "dense", max_position_embeddings=512)
    quantize(str(folder / "dense"), folder / "packed", "nf4")
    return str(folder / "packed")


@pytest.mark.parametrize("task", ROWS)
def test_a_task_has_the_hyperparameters_of_the_paper(task):
    config = FinetuneConfig.build({"model": "m", "out": "o"}, file=PAPER / f"{task}.yaml")
    assert (config.rank, config.alpha, config.dropout) == (8, 32, 0.1)
    assert (config.lr, config.scheduler, config.warmup) == (1e-3, "cosine", 0.06)
    assert (config.optim, config.targets) == ("adamw_torch", ("q_proj", "v_proj"))
    assert config.batch_size * config.grad_accum == BATCH[task]
    assert (config.steps, config.epochs) == {"mnli": (None, 1), "samsum": (350, None)}.get(
        task, (None, 3)
    )


@pytest.mark.parametrize("task", ROWS)
def test_a_task_trains_and_is_measured(task, packed, tmp_path, capsys):
    metric, key = MEASURED[task]
    if metric == "rouge":
        pytest.importorskip("rouge_score")
    config, data = str(PAPER / f"{task}.yaml"), write_jsonl(tmp_path / "rows.jsonl", *ROWS[task])
    out = str(tmp_path / "out")
    words = ["finetune", packed, out, "--config", config, "--data", str(data), "--eval-data",
             str(data), "--steps", "1", "--batch-size", "2", "--grad-accum", "1"]  # fmt: skip
    assert main([*words, "--seq-len", "256", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    evaluate = ["evaluate", packed, "--adapter", out, "--metric", metric, "--beams", "2", "--json",
                "--max-new-tokens", "4", "--data", str(data)]  # fmt: skip
    assert main([*evaluate, "--config", config]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found[key] <= 1
    assert found["examples"] == len(ROWS[task])
