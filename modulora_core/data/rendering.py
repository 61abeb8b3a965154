"""Render conversations as tokens, and mark the tokens that are trained.

The tokenizer's chat template renders a conversation, as in generation. Without a template it is
plain text that the end-of-sequence token closes. The template gives one string for many turns. We
find the assistant's turns in it by rendering prefixes::

    template(messages[:i], add_generation_prompt=True)      the prompt of turn i
    template(messages[:i + 1])                              the same, and turn i as an answer

The second must start with the first, and the next turn's prompt with the second: both are checked.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modulora_core.data.formats import IGNORED, Conversation
from modulora_core.data.messages import Message
from modulora_core.errors import DataError
from modulora_core.models.tokenizer import render

Encoded = tuple[list[int], list[int]]
"""Token ids, and labels: the id if it is trained, else :data:`IGNORED`."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """The text of a conversation in pieces.

    Attributes:
        pieces: ``(text, trained)``, one after the other; the last one is trained.
        templated: whether a chat template wrote it. If not, the tokenizer's own BOS goes in front
            if it uses one, and EOS closes the answer.
    """

    pieces: tuple[tuple[str, bool], ...]
    templated: bool

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """The token ids of each text, without the tokenizer's warning about long texts."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False,
        verbose=False,
    )["input_ids"]  # fmt: skip
    return ids


def check_ids(ids: Sequence[int] | array[int], vocabulary: int, subject: str) -> None:
    """Refuse token ids that are not below ``vocabulary``. Raises DataError."""
    if ids and (largest := max(ids)) >= vocabulary:
        raise DataError(
            f"{subject}: expected token ids below {vocabulary}, the model's vocabulary, got "
            f"{largest} from the tokenizer; copy the tokenizer files of the model that it was "
            "made from into the folder"
        )


def _check_role(message: Message, template: str, text: str, place: str) -> None:
    """Refuse a turn of a role that the template prints unread, or leaves out. Raises DataError."""
    role, content = message["role"], message["content"].strip()
    if role in ("system", "user", "assistant"):
        return
    if role != "tool" and f"'{role}'" not in template and f'"{role}"' not in template:
        raise DataError(
            f"{place}: role: expected system, user, assistant, tool, or another role that the "
            f"tokenizer's chat template names, got {role!r:.40}"
        )
    if content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
        raise DataError(f"{place}: the tokenizer's chat template leaves out turns of {role}")


class Renderer:
    """Renders conversations for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._special = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        first = token_ids(tokenizer, ["a"], add_special_tokens=True)[0][:1]
        self._start = first if first == [tokenizer.bos_token_id] else []

    def render(self, conversation: Conversation) -> list[Rendering]:
        """The conversation as the model reads it.

        Returns:
            one rendering, or several if the template rewrites earlier turns, such as by dropping
            their reasoning. Each holds turns that are trained together.

        Raises DataError.
        """
        if self.has_template:
            return self._templated(conversation)
        if conversation.plain is None:
            raise DataError(
                f"{conversation.place}: a chat needs a chat template, and this tokenizer has none; "
                "take an instruction-tuned model, put a chat_template.jinja beside its tokenizer, "
                "or give the data as prompt and completion"
            )
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token (eos_token), so no answer can be "
                "closed; set one"
            )
        prompt, answer = conversation.plain
        return [Rendering(((prompt, False), (answer, True)), templated=False)]

    def _templated(self, conversation: Conversation) -> list[Rendering]:
        renderings: list[Rendering] = []
        pieces: list[tuple[str, bool]] = []
        place = conversation.place
        done = ""  # the text of `pieces`
        answers = conversation.answers
        texts = iter(self._apply(conversation))
        for i in answers:
            prompt, answered = next(texts), next(texts)
            if not answered.startswith(prompt):
                raise DataError(
                    f"{place}: message {i + 1}: the tokenizer's chat template doesn't continue its "
                    f"own prompt: expected a rendering that starts with {prompt[-40:]!r}, got one "
                    f"that ends in {answered[-80:]!r}; use another chat template"
                )
            if not prompt.startswith(done):  # the template has rewritten an earlier turn
                renderings.append(Rendering(tuple(pieces), templated=True))
                pieces, done = [], ""
            answer = self._without_tail(answered[len(prompt) :])
            pieces += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        return [*renderings, Rendering(tuple(pieces), templated=True)]

    def _apply(self, conversation: Conversation) -> list[str]:
        """The prompt of each answer, and the text up to its end."""
        messages, place = conversation.messages, conversation.place
        turns = [
            (messages[: i + done], not done) for i in conversation.answers for done in (False, True)
        ]
        template = self.tokenizer.get_chat_template(tools=conversation.tools or None)
        for name, used in (
            ("tools", conversation.tools),
            ("tool_calls", any(message.get("tool_calls") for message in messages)),
        ):
            if used and name not in template:
                raise DataError(
                    f"{place}: the tokenizer's chat template knows no {name}; take a model that "
                    f"was trained to call tools, or leave them out"
                )
        try:
            texts = render(self.tokenizer, turns, conversation.tools)
        except ValueError as error:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise DataError(
                f"{place}: the tokenizer's chat template refuses turns of {roles}: {error}"
            ) from error
        for i, message in enumerate(messages[: conversation.answers[-1]]):
            _check_role(message, template, texts[-1], f"{place}: message {i + 1}")
        return texts

    def _without_tail(self, turn: str) -> str:
        """The turn up to the special token that ends it: generation stops there."""
        trimmed = turn.rstrip()
        return trimmed if trimmed.endswith(self._special) else turn

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoded]:
        """Token ids and labels of each rendering.

        The prompt's tokens are the tokens of the prompt alone, as in generation. If the tokenizer
        would merge characters across the start of an answer, both are tokenized alone.
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
        """The token ids of everything before the last answer: the prompt of a generation."""
        prompt = "".join(text for text, _ in rendering.pieces[:-1])
        ids = token_ids(self.tokenizer, [prompt])[0]
        return ids if rendering.templated else [*self._start, *ids]
