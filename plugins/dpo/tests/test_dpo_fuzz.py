"""Any records are read as preferences, or refused in one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modulora_dpo.preferences import load_preferences

from modulora_core.tests.fuzzing import cases, read_or_refused
from modulora_core.tests.tiny_tokenizer import make_tokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
TEXT = st.text(max_size=9)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "fox"]), "content": TEXT}
)
SAID = st.one_of(TEXT, st.lists(TURN, max_size=3), st.none(), st.integers())
ROWS = st.lists(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "chosen", "rejected"), SAID)),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "templated"])
def tokenizer(request):
    return make_tokenizer(template=request.param)


@cases(100)
@given(rows=ROWS)
def test_records_are_read_or_refused(rows, tokenizer):
    found = read_or_refused(lambda: load_preferences(rows, tokenizer, seq_len=16))
    for row in found or ():
        assert row.keys() == {"prompt", "chosen", "rejected"}
        assert len({type(value) for value in row.values()}) == 1
