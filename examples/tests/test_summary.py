"""examples/benchmarks/summary.py: one table from the files of several benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "summary.py"
ENVIRONMENT = {
    "cpu": "Toy",
    "cores": 2,
    "instructions": "AVX2",
    "threads": 2,
    "load": None,
    "versions": {},
}


def test_a_row_has_the_ratios_of_all_files_and_the_model_with_a_packed_head(tmp_path: Path) -> None:
    common = {"dtype": "float32", "ratio": 1.0}
    layer = {**common, "method": "dense", "passes": "forward", "rows": 1, "seconds": 0.002}
    step = {**common, "peak_memory_bytes": 2**30}
    runs = {
        "layer": [layer, {**layer, "method": "mine", "ratio": 0.5, "seconds": 0.001}],
        "training": [
            {**step, "method": "dense", "seconds": 4.0},
            {**step, "method": "mine, head int8", "ratio": 0.75, "seconds": 3.0},
            {**step, "method": "mine", "ratio": 0.9, "seconds": 3.6},
        ],
        "decoding": [{**common, "method": "mine", "new_tokens": 30, "seconds": 2.0}],
    }
    for name, results in runs.items():
        run = {"benchmark": name, "environment": ENVIRONMENT, "results": results}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    words = [sys.executable, SCRIPT, *sorted(tmp_path.glob("*.json"))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    columns = ["1 row", "16 rows", "512 rows", "with backward", "step", "MiB", "tokens/s"]
    assert rows[0] == ["", *columns]
    assert sorted(rows[2:]) == [
        ["dense", "2.00 ms", "–", "–", "–", "4.00 s", "1024", "–"],
        ["mine", "0.50", "–", "–", "–", "0.75", "1024", "15.0"],
    ]
