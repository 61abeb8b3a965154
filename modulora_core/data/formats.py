"""Tell the format of training data, and check the fields of its records.

========== ======================================= ==========================================
format     fields                                  trained tokens
========== ======================================= ==========================================
text       text                                    every token
instruct   instruction, output [, input]           the output
chat       messages: a list of role, content; or   all turns of the assistant
           conversations: a list of from, value
completion prompt, completion; or text, label      the completion; the label
tokens     input_ids [, labels, or a mask]         labels that aren't -100; masked tokens; or all
========== ======================================= ==========================================

Prompts and completions are strings or lists of messages. A content may be a list of parts of type
text. ``tool_calls`` of a message and ``tools`` of a record reach the chat template.
Other fields are ignored. ``conversations`` is the form of ShareGPT, which calls the user human and
the assistant gpt. If a record has ``messages`` too, those are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, StrictStr, ValidationError

from modulora_core.data.files import Record
from modulora_core.data.messages import Message, Said, Tools, Turn, messages
from modulora_core.errors import DataError, OptionError
from modulora_core.options import in_one_line

Format = Literal["text", "instruct", "chat", "completion", "tokens"]
FORMATS: tuple[Format, ...] = get_args(Format)

IGNORED = -100
"""The label of a token that isn't trained, as in torch's cross-entropy."""

_SHAPES: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("text", ("text",)),
    ("instruct", ("instruction", "output")),
    ("chat", ("messages",)),
    ("completion", ("prompt", "completion")),
    ("completion", ("text", "label")),
    ("chat", ("conversations",)),
    ("tokens", ("input_ids",)),
)
_ANSWER_MASKS = ("completion_mask", "assistant_masks")
FIELDS = frozenset(name for _, fields in _SHAPES for name in fields).union(
    ("input", "chosen", "rejected", "tools", "labels", "attention_mask", *_ANSWER_MASKS)
)
"""All fields of records that are read."""

_ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Stanford Alpaca (Taori et al. 2023), for models without a chat template."""


Fields = TypeVar("Fields", bound=BaseModel)


class _Text(BaseModel):
    text: StrictStr


class _Instruct(BaseModel):
    instruction: StrictStr
    output: StrictStr
    input: StrictStr | None = None


def _label(value: object) -> str:
    if value is None:
        raise ValueError(
            "expected a label in every row (leave out rows without one, or finetune with "
            "--format text)"
        )
    if not isinstance(value, str | int):
        raise ValueError("expected a string or a whole number")  # noqa: TRY004  pydantic wants it
    return str(value)


class _Labelled(BaseModel):
    text: StrictStr
    label: Annotated[str, BeforeValidator(_label)]


class _Completion(Tools):
    prompt: Said
    completion: Said


class _Chat(Tools):
    messages: Annotated[list[Turn], Field(min_length=1)]


Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]
Mask = list[Literal[0, 1]]


class _Tokens(BaseModel):
    input_ids: Ids
    labels: list[int] | None = None
    attention_mask: Mask | None = None
    completion_mask: Mask | None = None
    assistant_masks: Mask | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of which the assistant's are trained.

    Attributes:
        messages: the turns, for a tokenizer with a chat template.
        plain: ``(prompt, answer)`` for a tokenizer without one; None for a chat.
        place: the place of the record, for messages.
        asked: the number of turns of the prompt, of which none is trained.
        tools: the tools that the chat template describes.
    """

    messages: tuple[Message, ...]
    plain: tuple[str, str] | None
    place: str
    asked: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def answers(self) -> list[int]:
        """The numbers of the turns that are trained."""
        turns = enumerate(self.messages)
        return [i for i, turn in turns if i >= self.asked and turn["role"] == "assistant"]

    @property
    def answer(self) -> str:
        """The assistant's last turn."""
        return next(str(m["content"]) for m in reversed(self.messages) if m["role"] == "assistant")

    @property
    def is_blank(self) -> bool:
        """Whether the assistant says nothing at all."""
        answers = (self.messages[i] for i in self.answers)
        return not any(turn["content"].strip() or turn.get("tool_calls") for turn in answers)


def detect(records: Sequence[Record], requested: str = "auto", *, answers: bool = False) -> Format:
    """The format of ``records``: ``requested``, or for ``"auto"`` the format of the first record.

    With ``answers``, a record with a text and with a question and its answer is the latter.
    """
    if requested != "auto":
        if requested not in FORMATS:
            raise OptionError(f"format: expected auto, {', '.join(FORMATS)}, got {requested!r}")
        return requested
    place, present = records[0].place, _present(records[0])
    found = {format_: None for format_, fields in _SHAPES if present.issuperset(fields)}
    if "tokens" in found:  # other columns are the ones that they were made from
        found = {"tokens": None}
    if "label" in present or (answers and len(found) > 1):
        found.pop("text", None)  # a text with a label is a completion
    if present.issuperset(("chosen", "rejected")):
        raise DataError(
            f"{place}: expected one answer for each prompt, got chosen and rejected; `modulora "
            "dpo` trains on them"
        )
    if not found:
        shapes = "; or ".join(", ".join(fields) for _, fields in _SHAPES)
        raise DataError(
            f"{place}: expected the fields {shapes} (in a .csv file the first line names them); "
            f"got {_shown(present)}"
        )
    if len(found) > 1:
        raise DataError(
            f"{place}: expected the fields of one format, got those of {' and '.join(found)} "
            f"({_shown(present)}); say which with --format"
        )
    return next(iter(found))


def _present(record: Record) -> set[str]:
    # tables have every column in every row: an empty one is null
    return {str(name) for name, value in record.fields.items() if value is not None}


def _shown(names: set[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in sorted(names)[:8])
    return f"the fields {shown}" if shown else "no fields"


def check_all(records: Sequence[Record], format_: Format) -> None:
    """Check each record of a format without a tokenizer. Raises DataError."""
    if format_ == "text":
        texts(records)
    elif format_ == "tokens":
        for record in records:
            tokens(record)
    else:
        conversations(records, format_)


def texts(records: Sequence[Record]) -> list[str]:
    """The texts of records in format text. Raises DataError for a missing field or a wrong type."""
    return [checked(record, _Text).text for record in records]


def conversations(records: Sequence[Record], format_: Format) -> list[Conversation]:
    """The conversations of records in format instruct, chat or completion. Raises DataError."""
    if format_ == "tokens":
        raise DataError(
            f"{records[0].place}: expected text, got tokens (input_ids), which finetune alone reads"
        )
    convert = {"instruct": _instruct, "chat": _chat, "completion": _completion}[format_]
    return [convert(record) for record in records]


def instruction_prompt(instruction: str, input: str = "") -> str:
    """The prompt for a model without a chat template: Alpaca's, with or without an input."""
    paired = ", paired with an input that provides further context" if input else ""
    shown = f"### Input:\n{input}\n\n" if input else ""
    return _ALPACA.format(paired=paired, instruction=instruction, input=shown)


def checked(record: Record, kind: type[Fields]) -> Fields:
    """The fields of a record. Raises DataError for a missing field or a wrong type."""
    try:
        return kind.model_validate(record.fields)
    except ValidationError as error:
        raise DataError(f"{record.place}: {in_one_line(error)}") from None


def _instruct(record: Record) -> Conversation:
    read = checked(record, _Instruct)
    input = read.input or ""
    user = f"{read.instruction}\n\n{input}" if input else read.instruction
    plain = (instruction_prompt(read.instruction, input), read.output)
    return _exchange(user, read.output, plain, record.place)


def _completion(record: Record) -> Conversation:
    if "label" in record.fields and "prompt" not in record.fields:
        read = checked(record, _Labelled)
        plain = (f"{read.text}\nLabel:", f" {read.label}")
        return _exchange(read.text, read.label, plain, record.place)
    pair = checked(record, _Completion)
    if isinstance(pair.prompt, str) and isinstance(pair.completion, str) and not pair.tools:
        plain = (pair.prompt, pair.completion)
        return _exchange(pair.prompt, pair.completion, plain, record.place)
    prompt, completion = messages(pair.prompt, "user"), messages(pair.completion, "assistant")
    return _conversation([*prompt, *completion], record.place, pair.tools, asked=len(prompt))


def _exchange(user: str, assistant: str, plain: tuple[str, str], place: str) -> Conversation:
    turns = ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    return Conversation(turns, plain, place)


def _chat(record: Record) -> Conversation:
    present = _present(record)
    if "messages" not in present and "conversations" in present:
        record = Record({"messages": record.fields["conversations"]}, record.place)
    read = checked(record, _Chat)
    return _conversation(messages(read.messages, ""), record.place, read.tools)


def _conversation(
    turns: Sequence[Message], place: str, tools: list[dict[str, Any]] | None, asked: int = 0
) -> Conversation:
    found = Conversation(tuple(turns), None, place, asked, tuple(tools or ()))
    if not found.answers:
        roles = ", ".join(turn["role"] for turn in turns[asked:])
        raise DataError(
            f"{place}: messages: expected a turn of the assistant to train, got only {roles}"
        )
    return found


def tokens(record: Record) -> tuple[list[int], list[int]]:
    """The ids and labels of a record in format tokens. A label is -100, or the token at its place.

    Raises DataError: lists of other lengths, or labels of other tokens.
    """
    read = checked(record, _Tokens)
    ids, columns = read.input_ids, read.model_dump(exclude_none=True)
    for name, column in columns.items():
        if len(column) != len(ids):
            raise DataError(
                f"{record.place}: {name}: expected as many as input_ids, {len(ids)}, got "
                f"{len(column)}"
            )
    masks = {name: columns[name] for name in _ANSWER_MASKS if name in columns}
    if masks and read.labels is not None:
        raise DataError(
            f"{record.place}: expected labels or {next(iter(masks))}, got both; leave one out"
        )
    marked = [i if all(on) else IGNORED for i, *on in zip(ids, *masks.values(), strict=True)]
    labels = marked if read.labels is None else read.labels
    wrong = next((n for n, (i, label) in enumerate(zip(ids, labels, strict=True))
                  if label not in (i, IGNORED)), None)  # fmt: skip
    if wrong is not None:
        raise DataError(
            f"{record.place}: labels: expected {IGNORED} or the token at the same place, since "
            f"the model shifts them itself, got {labels[wrong]} at {wrong}, where the token is "
            f"{ids[wrong]}"
        )
    kept = columns.get("attention_mask", [1] * len(ids))  # the rest is padding
    pairs = [(i, label) for i, label, on in zip(ids, labels, kept, strict=True) if on]
    return [i for i, _ in pairs], [label for _, label in pairs]
