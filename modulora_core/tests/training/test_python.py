"""Finetuning from a Python program: records, dtypes, progress bars, and types."""

import pytest

from modulora_core import finetune
from modulora_core.errors import OptionError

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [{"prompt": f"{word}?", "completion": f" {word}"} for word in ("yes", "no", "so", "now")]


def test_records_train_as_a_file_of_them_does(configure, tmp_path):
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(ROWS).to_json(file)
    expected = finetune(configure(data=str(file), steps=2, dropout=0)).losses
    for number, rows in enumerate((ROWS, datasets.Dataset.from_list(ROWS))):
        out = tmp_path / str(number)
        config = configure(data=None, out=str(out), steps=2, dropout=0, eval_every=1)
        result = finetune(config, data=rows, eval_data=rows)
        assert result.losses == expected
        assert result.eval_loss is not None
        assert "Data: 4 records." in (out / "README.md").read_text()
    with pytest.raises(OptionError, match="data: expected it in the config or beside it, got both"):
        finetune(configure(), data=ROWS)
    with pytest.raises(OptionError, match="data: expected training data, got none"):
        finetune(configure(data=None))


# bars


# types
