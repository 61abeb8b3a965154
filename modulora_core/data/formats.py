"""The four shapes of training data: which one a record has, and its fields, checked.

========== ======================================= ==========================================
format     fields                                  what is trained
========== ======================================= ==========================================
text       text                                    every token
instruct   instruction, output [, input]           the output
chat       messages: a list of role, content; or   the assistant's turns, all of them
           conversations: a list of from, value
completion prompt, completion; or text, label      the completion; the label
========== ======================================= ==========================================

Other fields are left alone. ``conversations`` is the form of ShareGPT, which calls the user human and the assistant gpt; where a record has
``messages`` too, these count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from modulora_core.data.files import Record
from modulora_core.errors import DataError, OptionError

Format = Literal["text", "instruct", "chat", "completion"]
FORMATS: tuple[Format, ...] = get_args(Format)
Message = Mapping[str, Any]
"""One turn of a conversation: ``role``, ``content``, and what else the chat template may read."""

_FIELDS: Mapping[Format, tuple[str, ...]] = MappingProxyType(
    {
        "text": ("text",),
        "instruct": ("instruction", "output"),
        "chat": ("messages",),
        "completion": ("prompt", "completion"),
    }
)

_SHAREGPT_ROLES: Mapping[str, str] = MappingProxyType({"human": "user", "gpt": "assistant"})

_ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Stanford Alpaca (Taori et al. 2023), which models without a chat template are asked with."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text of which every token is trained."""

    text: str
    place: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of which the assistant's are trained.

    Attributes:
        messages: for a tokenizer with a chat template.
        plain: ``(prompt, answer)`` for one without; None for a chat, where only a template will do.
        place: where the record is, for messages.
    """

    messages: tuple[Message, ...]
    plain: tuple[str, str] | None
    place: str

    @property
    def answer(self) -> str:
        """The assistant's last turn."""
        return next(str(m["content"]) for m in reversed(self.messages) if m["role"] == "assistant")

    @property
    def is_blank(self) -> bool:
        """Whether the assistant says nothing at all."""
        return not any(m["content"].strip() for m in self.messages if m["role"] == "assistant")


def detect(records: Sequence[Record], requested: str = "auto") -> Format:
    """The format of ``records``: ``requested``, or for ``"auto"`` the one whose fields they have.

    Raises:
        OptionError: ``requested`` is no format.
        DataError: a record has the fields of no format, of several, or of another one than the first record.
    """
    if requested != "auto":
        if requested not in FORMATS:
            raise OptionError(f"format: expected auto, {', '.join(FORMATS)}, got {requested!r}")
        return requested
    first = _detect_one(records[0])
    for record in records[1:]:
        if (other := _detect_one(record)) != first:
            raise DataError(f"{record.place}: expected format {first} as in {records[0].place}, got {other}; "
                            "one run takes one format: give the others in a run of their own")  # fmt: skip
    return first


def _detect_one(record: Record) -> Format:
    present = _present(record)
    fields = dict(_FIELDS)
    if (
        "label" in present
    ):  # which beside `text` makes it label data, which is trained as a completion
        fields["text"] = ("text", "label")
    if "messages" not in present:
        fields["chat"] = ("conversations",)
    found = [format_ for format_ in FORMATS if present.issuperset(fields[format_])]
    if not found:
        raise DataError(f"{record.place}: expected {_expected_fields()}; got {_got(present)}")
    if len(found) > 1:
        raise DataError(
            f"{record.place}: expected the fields of one format, got those of {' and '.join(found)} "
            f"({_got(present)}); say which with --format"
        )
    return "completion" if found == ["text"] and "label" in present else found[0]


def _present(record: Record) -> set[str]:
    # tables have every column in every row: an empty one is null
    return {name for name, value in record.fields.items() if value is not None}


def _expected_fields() -> str:
    shapes = "; or ".join(
        ", ".join(fields) for fields in [*_FIELDS.values(), ("text", "label"), ("conversations",)]
    )
    return f"the fields {shapes} (in a .csv file the first line names them)"


def _got(names: set[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in sorted(map(str, names))[:8])
    return f"the fields {shown}" if shown else "no fields"


def documents(records: Sequence[Record]) -> list[Document]:
    """The texts of records in format text. Raises DataError with the place: a missing field, a wrong type."""
    return [Document(_string(record, "text"), record.place) for record in records]


def conversations(records: Sequence[Record], format_: Format) -> list[Conversation]:
    """The conversations of records in format instruct, chat or completion.

    Raises:
        DataError: with the place: a missing field, a wrong type, no assistant's turn.
    """
    convert = {"instruct": _instruct, "chat": _chat, "completion": _completion}[format_]
    return [convert(record) for record in records]


def instruction_prompt(instruction: str, input: str = "") -> str:
    """What a model without a chat template is asked with: Alpaca's prompt, with or without an input."""
    paired = ", paired with an input that provides further context" if input else ""
    return _ALPACA.format(
        paired=paired, instruction=instruction, input=f"### Input:\n{input}\n\n" if input else ""
    )


def _instruct(record: Record) -> Conversation:
    instruction, output = _string(record, "instruction"), _string(record, "output")
    input = "" if record.fields.get("input") is None else _string(record, "input")
    user = f"{instruction}\n\n{input}" if input else instruction
    return _exchange(user, output, (instruction_prompt(instruction, input), output), record.place)


def _completion(record: Record) -> Conversation:
    if "label" in _present(record) and "prompt" not in record.fields:
        text, label = _string(record, "text"), _label(record)
        return _exchange(text, label, (f"{text}\nLabel:", f" {label}"), record.place)
    prompt, completion = _string(record, "prompt"), _string(record, "completion")
    return _exchange(prompt, completion, (prompt, completion), record.place)


def _exchange(user: str, assistant: str, plain: tuple[str, str], place: str) -> Conversation:
    turns = ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    return Conversation(turns, plain, place)


def _chat(record: Record) -> Conversation:
    present = _present(record)
    name = (
        "conversations" if "conversations" in present and "messages" not in present else "messages"
    )
    messages = _field(record, name)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{record.place}: {name}: expected a list of turns, got {_shown(messages)}")
    turns = tuple(
        _turn(message, number, record.place) for number, message in enumerate(messages, start=1)
    )
    if not any(turn["role"] == "assistant" for turn in turns):
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{record.place}: {name}: expected a turn of the assistant to train on, got only {roles}"
        )
    return Conversation(turns, None, record.place)


def _turn(message: Any, number: int, place: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(
            f"{place}: message {number}: expected an object with role and content, got {_shown(message)}"
        )
    of_sharegpt = "role" not in message and "from" in message
    names = ("from", "value") if of_sharegpt else ("role", "content")
    for name in names:
        if not isinstance(message.get(name), str):
            raise DataError(
                f"{place}: message {number}: expected a string as its {name}, got {_shown(message.get(name))}"
            )
    role, content = (message[name] for name in names)
    others = {
        name: value for name, value in message.items() if name not in names and value is not None
    }
    return {
        "role": _SHAREGPT_ROLES.get(role, role) if of_sharegpt else role,
        "content": content,
        **others,
    }


def _field(record: Record, name: str) -> Any:
    if name not in _present(record):
        raise DataError(f"{record.place}: missing field {name!r}; got {_got(_present(record))}")
    return record.fields[name]


def _string(record: Record, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise DataError(f"{record.place}: field {name!r}: expected a string, got {_shown(value)}")
    return value


def _label(record: Record) -> str:
    value = _field(record, "label")
    if not isinstance(value, str | int):
        raise DataError(
            f"{record.place}: field 'label': expected a string or a whole number, got {_shown(value)}"
        )
    return str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}..." if len(text) > 60 else text
