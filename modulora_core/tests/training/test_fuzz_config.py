"""Any YAML file for --config is a run, or refused in one line; a written one is the same run."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modulora_core.tests.fuzzing import VALUES, cases, read_or_refused
from modulora_core.training.config import FinetuneConfig

FIELDS = sorted(FinetuneConfig.model_fields)
WHOLE = {"model": "packed", "out": "adapter", "data": ["a.jsonl", "b.jsonl"], "rank": 4,
         "trainer": {"adam_beta2": 0.9}}  # fmt: skip


def build(path):
    return FinetuneConfig.build({}, file=path)


@pytest.mark.slow
@cases(75)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_fields_of_any_kind_are_read_or_refused(fields, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(WHOLE | fields))
    config = read_or_refused(lambda: build(path))
    if config is not None:
        path.write_text(config.to_yaml())
        assert build(path) == config
