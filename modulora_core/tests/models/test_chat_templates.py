"""Chat templates are rendered as transformers does, and their errors are sentences."""

import pytest

from modulora_core.models.tokenizer import render
from modulora_core.tests.tiny_tokenizer import make_tokenizer, smol_tokenizer

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Say 😀 é \u2028 one."},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Two?"},
]


def rendered(template):
    (text,) = render(make_tokenizer(template=template), [(TURNS[1:2], True)])
    return text


def test_renderings_are_those_of_transformers():
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
def test_an_error_of_a_template_is_told(template, message):
    with pytest.raises(ValueError, match=message):
        rendered(template)
