"""Every rendering of a chat template has limits of time and memory, whatever it recognizes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modulora_core.data import load_examples
from modulora_core.errors import DataError, ModelError
from modulora_core.inference.generate import _prompt_ids
from modulora_core.models import chat_templates
from modulora_core.models.chat_templates import LONGEST, render
from modulora_core.models.tokenizer import load_tokenizer
from modulora_core.models.workers import worker
from modulora_core.tests.tiny_tokenizer import make_tokenizer, smol_tokenizer, write_jsonl

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Say 😀 é \u2028 one."},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Two?"},
]


def rendered(template: str) -> str:
    (text,) = render(make_tokenizer(template=template), [(TURNS[1:2], True)])
    return text


def test_renderings_are_those_of_transformers() -> None:
    tokenizer = smol_tokenizer()
    beginnings = [(TURNS[:n], prompt) for n in range(1, 5) for prompt in (True, False)]
    assert render(tokenizer, beginnings) == [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        for turns, prompt in beginnings
    ]
    assert rendered("{{ bos_token }}{{ messages[0]['content'] }}") == "<s>" + TURNS[1]["content"]
    assert rendered("{% generation %}a{% endgeneration %}{{ {'b': 1} | tojson }}") == 'a{"b": 1}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% if", "unexpected 'end of template'"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "maximum recursion depth"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_an_error_of_a_template_is_told(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(template)


GROWING = [
    "{{ 'ab' * (2 * 10**9) }}",
    "{% if messages[0].content != 'text' %}{{ 'ab' * (2 * 10**9) }}{% endif %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
]


@pytest.mark.parametrize("template", GROWING)
def test_a_template_that_grows_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="expected a rendering within 5 seconds and 256 MiB"):
        rendered(template)
    assert rendered("{{ messages[0].role }}") == "user", "the next template is rendered"


SLOW = {
    "a method": "{{ 'a'.ljust(10**10) }}",
    "a format": "{{ '%0999999999d' % 1 }}",
    "a filter": "{{ 'a' | center(10**10) }}",
    "output": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "one operation": "{{ ('ab' * 10**6) | urlize }}{{ lipsum(n=10**7) }}",
    "text": "{{ a }}" * (LONGEST // 7),
}


@pytest.mark.slow
@pytest.mark.parametrize("template", SLOW.values(), ids=SLOW)
def test_a_template_that_takes_long_is_refused(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    with pytest.raises(ValueError, match="expected a rendering within 1 seconds and 256 MiB"):
        rendered(template)


def test_the_limit_of_time_is_of_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.5)
    started = time.process_time()
    for _ in range(30):  # together they take longer
        rendered("{% for i in range(99999) %}{% endfor %}")
    with pytest.raises(ValueError, match=r"within 0\.5 seconds"):
        rendered(SLOW["loops"])
    assert time.process_time() - started < 5


def test_threads_share_a_worker_and_a_fork_has_its_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: rendered("{{ " + str(i) + " }}"), range(64)))
    assert texts == [str(i) for i in range(64)]
    if hasattr(os, "fork"):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(rendered, ["{{ 1 }}", "{{ 2 }}"]) == ["1", "2"]
    assert rendered("{{ 3 }}") == "3"


def test_a_worker_that_was_killed_is_replaced() -> None:
    assert rendered("{{ 1 }}") == "1"
    script = Path(chat_templates.__file__).with_name("template_worker.py")
    with worker(script, str(chat_templates.SECONDS), str(chat_templates.MEMORY)) as process:
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert rendered("{{ 2 }}") == "2"


def test_training_and_generation_render_within_the_limits(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=GROWING[1])
    rows = write_jsonl(tmp_path / "rows.jsonl", {"messages": TURNS[1:3]})
    with pytest.raises(DataError, match=r"line 1: .* 256 MiB of memory; take another template"):
        load_examples(rows, tokenizer, seq_len=50)
    with pytest.raises(DataError, match=r"refuses the prompt: .* 256 MiB of memory"):
        _prompt_ids(tokenizer, TURNS[1:2])


def test_a_long_template_is_refused_when_the_tokenizer_is_loaded(tmp_path: Path) -> None:
    make_tokenizer(template="a" * (LONGEST + 1)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"chat template: expected text of at most 262,144 char"):
        load_tokenizer("it", tmp_path)
