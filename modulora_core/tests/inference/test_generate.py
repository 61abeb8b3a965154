"""Text is generated from a name, an opened model or a loaded one."""

import pytest

from modulora_core.errors import DataError, WorkError
from modulora_core.inference.generate import generate
from modulora_core.inference.opened import open_to_run
from modulora_core.models.generation import Sampling

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def loaded(tunable):
    opened = open_to_run(str(tunable))
    return opened.load(), opened.tokenizer


def test_a_text_is_continued_greedily_and_streamed(tunable, loaded):
    model, tokenizer = loaded
    pieces = []
    found = generate(str(tunable), "The", Sampling(max_new_tokens=5), on_text=pieces.append)
    ids = tokenizer("The", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert found.text == tokenizer.decode(out, skip_special_tokens=True) == "".join(pieces)
    assert (found.prompt_tokens, found.tokens) == (ids.shape[1], len(out))
    assert found.to_json()["tokens_per_second"] == found.tokens / found.seconds
    assert generate(loaded, "The", Sampling(max_new_tokens=5)).text == found.text


def test_a_text_is_a_users_message_if_there_is_a_template(loaded):
    loaded[1].chat_template = TEMPLATE
    one = Sampling(max_new_tokens=1)
    message = [{"role": "user", "content": "The"}]
    assert (
        generate(loaded, "The", one).prompt_tokens == generate(loaded, message, one).prompt_tokens
    )
    expected = len(loaded[1]("<user>The<assistant>").input_ids)
    assert generate(loaded, "The", one).prompt_tokens == expected
    assert generate(loaded, "The", one, raw=True).prompt_tokens < expected


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ("", 4, "prompt: expected some text, got none"),
        ("caf\udce9", 4, "expected text in UTF-8, got other bytes after 'caf'"),
        ("The", 128, "expected at most the model's window of 128"),
        ([{"role": "user", "content": "a"}], 4, "the model's tokenizer has no chat template"),
        ([{"role": "user"}], 4, "expected a text, or messages"),
    ],
    ids=["empty", "bytes", "long", "conversation", "messages"],
)
def test_a_wrong_prompt_is_refused(tunable, prompt, tokens, message):
    with pytest.raises(DataError, match=message):
        generate(str(tunable), prompt, Sampling(max_new_tokens=tokens))


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_logits_that_are_not_finite_end_the_work(loaded, value):
    model, _ = loaded
    model.model.norm.weight.data.fill_(value)
    with pytest.raises(WorkError, match="expected finite logits, got NaN or Inf"):
        generate(loaded, "The", Sampling(max_new_tokens=2))
