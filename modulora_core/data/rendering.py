"""From conversations to tokens: what the model reads, and which tokens of it are trained.

A conversation is rendered the way the model is asked later: by the tokenizer's chat template where it has
one, else as plain text that the end-of-sequence token closes. The template gives one string for many turns;
where the assistant's turns are in it is found by rendering prefixes::

    template(messages[:i], add_generation_prompt=True)      what the model reads before turn i
    template(messages[:i + 1])                              the same, and turn i as it should be answered

The second must start with the first, and the next turn's prompt with the second: both are checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from modulora_core.data.formats import Conversation, Message
from modulora_core.errors import DataError

IGNORED = -100
"""The label of a token that isn't trained, as torch's cross-entropy has it."""

Encoded = tuple[list[int], list[int]]
"""Token ids, and labels: the id where it is trained, -100 elsewhere."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """The text of a conversation in pieces.

    Attributes:
        pieces: ``(text, trained)``, one after the other; the last one is trained.
        templated: whether a chat template wrote it. If not, the tokenizer's own BOS goes in front where it
            uses one, and EOS closes the answer.
    """

    pieces: tuple[tuple[str, bool], ...]
    templated: bool

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """The token ids of each text, however long: without the tokenizer's warning about its model's window."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


class Renderer:
    """How one tokenizer writes conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._special = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        bos, first = (
            tokenizer.bos_token_id,
            token_ids(tokenizer, ["a"], add_special_tokens=True)[0][:1],
        )
        self._start = first if bos is not None and first == [bos] else []

    def render(self, conversation: Conversation) -> list[Rendering]:
        """The conversation as the model reads it.

        Returns:
            one rendering; or several, where the template writes earlier turns otherwise once they are past
            (as those that drop the reasoning of earlier answers): each holds turns that are trained together.

        Raises:
            DataError: a chat, and the tokenizer has no chat template; the template refuses the conversation,
                or doesn't continue its own prompt; or there is no EOS token to close an answer.
        """
        if self.has_template:
            return self._templated(conversation)
        if conversation.plain is None:
            raise DataError(
                f"{conversation.place}: a chat needs a chat template, and this tokenizer has none; take an "
                "instruction-tuned model, put a chat_template.jinja beside its tokenizer, or give the data "
                "as prompt and completion"
            )
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token (eos_token), so no answer can be closed; set one"
            )
        prompt, answer = conversation.plain
        return [Rendering(((prompt, False), (answer, True)), templated=False)]

    def _templated(self, conversation: Conversation) -> list[Rendering]:
        renderings: list[Rendering] = []
        pieces: list[tuple[str, bool]] = []
        done = ""  # the text of `pieces`
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            prompt = self._apply(
                conversation.messages[:i], conversation.place, add_generation_prompt=True
            )
            answered = self._apply(conversation.messages[: i + 1], conversation.place)
            if not answered.startswith(prompt):
                raise _broken_prefix(conversation.place, i + 1, prompt, answered)
            if not prompt.startswith(done):  # the template has rewritten an earlier turn
                renderings.append(Rendering(tuple(pieces), templated=True))
                pieces, done = [], ""
            answer = self._without_tail(answered[len(prompt) :])
            pieces += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        return [*renderings, Rendering(tuple(pieces), templated=True)]

    def _apply(
        self, messages: Sequence[Message], place: str, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            roles = ", ".join(message["role"] for message in messages) or "no messages"
            raise DataError(
                f"{place}: the tokenizer's chat template refuses turns of {roles}: {error}"
            ) from error
        return text

    def _without_tail(self, turn: str) -> str:
        """The turn up to the special token that ends it.

        Generation stops there: what the template writes after it (mostly a line end) isn't the model's.
        """
        trimmed = turn.rstrip()
        return trimmed if trimmed.endswith(self._special) else turn

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoded]:
        """Token ids and labels of each rendering.

        The prompt's tokens are those that it has when it stands alone, as it does when the model is asked.
        Where the tokenizer would merge characters across the start of an answer, both are tokenized alone.
        """
        prefixes = [list(itertools.accumulate(text for text, _ in r.pieces)) for r in renderings]
        wholes = iter(token_ids(self.tokenizer, list(itertools.chain.from_iterable(prefixes))))
        return [
            self._encode_one(rendering, [next(wholes) for _ in rendering.pieces])
            for rendering in renderings
        ]

    def _encode_one(self, rendering: Rendering, wholes: Sequence[list[int]]) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        for (text, trained), whole in zip(rendering.pieces, wholes, strict=True):
            continues = whole[: len(ids)] == ids
            new = whole[len(ids) :] if continues else token_ids(self.tokenizer, [text])[0]
            ids += new
            labels += new if trained else [IGNORED] * len(new)
        if rendering.templated:
            return ids, labels
        eos = self.tokenizer.eos_token_id
        return [*self._start, *ids, eos], [*[IGNORED] * len(self._start), *labels, eos]

    def encode_prompt(self, rendering: Rendering) -> list[int]:
        """The token ids of everything before the last answer: what the model is asked with."""
        prompt = "".join(text for text, _ in rendering.pieces[:-1])
        ids = token_ids(self.tokenizer, [prompt])[0]
        return ids if rendering.templated else [*self._start, *ids]


def _broken_prefix(place: str, turn: int, prompt: str, answered: str) -> DataError:
    return DataError(
        f"{place}: message {turn}: the tokenizer's chat template doesn't continue its own prompt, so the "
        f"answer can't be told from it: expected a rendering that starts with the prompt, which ends in "
        f"{prompt[-40:]!r}, got one that ends in {answered[-80:]!r}; use another chat template"
    )
