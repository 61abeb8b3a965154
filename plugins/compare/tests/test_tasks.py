"""Tasks of lm-evaluation-harness run on packed models, with local files and without the Hub."""

import json

import pytest
import torch
import yaml
from modulora_compare.tasks import evaluate_tasks
from transformers import AutoTokenizer

from modulora_core import load_model, save_adapter
from modulora_core.cli import main
from modulora_core.errors import DataError
from modulora_core.tests.adapted_models import trained

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # each call reads the index of 14,000 YAML files

ROWS = [{"text": f"Is {n} even? It is", "answer": n % 2} for n in range(6)]
CHOICES = [" even", " odd, for it has a rest"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"test": str(tmp_path / "rows.jsonl")}
    task = {"task": "parity", "output_type": "multiple_choice", "test_split": "test",
            "dataset_path": "json", "dataset_kwargs": {"data_files": files},
            "doc_to_text": "{{text}}", "doc_to_choice": CHOICES, "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}]}  # fmt: skip
    (tmp_path / "parity.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def accuracy(model, tokenizer):
    correct = 0
    for row in ROWS:
        scores = []
        for choice in CHOICES:
            ids = tokenizer(row["text"] + choice, return_tensors="pt").input_ids
            first = len(tokenizer(row["text"]).input_ids)
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(logp.gather(1, ids[0, 1:, None])[first - 1 :].sum())
        correct += int(torch.stack(scores).argmax()) == row["answer"]
    return correct / len(ROWS)


def test_the_accuracy_of_a_local_task(tunable, folder):
    model = trained(load_model(tunable, device="cpu")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tunable)
    save_adapter(model, folder / "adapter")
    file = str(folder / "parity.yaml")
    expected = accuracy(model, tokenizer)
    found = evaluate_tasks(str(tunable), [file], adapter=str(folder / "adapter"))["parity"]
    assert found.metrics["acc"] == pytest.approx(expected)
    assert (found.examples, found.num_fewshot) == (6, 0)
    opened = evaluate_tasks((model, tokenizer), [file], batch_size=4, limit=3, num_fewshot=1)
    assert (opened["parity"].examples, opened["parity"].num_fewshot) == (3, 1)
    tokenizer.add_tokens(["even?"])
    with pytest.raises(DataError, match=r"tasks: expected token ids below \d+, .* got \d+ from"):
        evaluate_tasks((model, tokenizer), [file], limit=1)


def test_the_command(tunable, folder, capsys):
    words = ["tasks", str(tunable), "parity", "--include-path", str(folder)]
    assert main(["--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"]["parity"].keys() == {"metrics", "examples", "num_fewshot"}
    assert found["tasks"]["parity"]["metrics"].keys() == {"acc", "acc_stderr"}
    assert {"seconds", "peak_memory_bytes"} < found.keys()
