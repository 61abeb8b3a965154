"""Write GGUF files of small vocabularies with the special tokens and splits of known models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXTS = [
    "Hello world, it's 12345 cats!", "def f(x):\n\treturn x  + 1\n\n\n    y = [1,2,3]",
    "I'VE don't we'll THEY'RE 3.14159 'Sun", "1234567 12 1 2024-11-30 1,234,567.89",
    "日本語のテキスト、中文文本。한국어 文章 123", "naïve café Ünïcödé",
    "Привет мир Ελληνικά Հայերեն ქართული",
    "🙂🙂 👨‍👩‍👧 🚀go", "  leading and trailing  ", "\n\n\nnew\n\nlines\r\nwin\r\n",
    "a\t\tb \t c   d    e",
    "x=1;y==2&&z||!w $5+3^2 `code` ~a <b>", "مرحبا بالعالم ۱۲۳", "snake_case camelCase HTTPServer",
    "</s> special <s> inside <unk>", "… “quotes” ‘single’ — dash", "   ", "\n",
    "a", "a/b?c=d&e=%20#f",
]  # fmt: skip


@dataclass(frozen=True)
class Imitation:
    """A vocabulary like a model's.

    Attributes:
        model: ``"gpt2"`` for bytes, ``"llama"`` for SentencePiece.
        pre: the name of the split.
        control, plain: control tokens, and user-defined tokens.
        bos, eos: None leaves the field out.
        user, answer: a turn of a chat, with ``{}`` for its text.
        flags: further fields ``tokenizer.ggml.*``.
        name: the field ``general.name``.
        architecture: the field ``general.architecture``.
    """

    model: str
    pre: str
    control: tuple[str, ...]
    plain: tuple[str, ...]
    bos: str | None
    eos: str | None
    user: str
    answer: str
    flags: tuple[tuple[str, bool | str], ...] = ()
    name: str = "tiny"
    architecture: str = "llama"


_LLAMA_3 = tuple(f"<|{name}|>" for name in (
    "begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id",
    "python_tag", "reserved_special_token_0",
))  # fmt: skip
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_PHI_3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|placeholder1|>")
_MISTRAL = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]")

IMITATIONS = {
    "llama-3": Imitation(
        "gpt2", "llama-bpe", _LLAMA_3, (), "<|begin_of_text|>", "<|end_of_text|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    ),
    "qwen2": Imitation(
        "gpt2", "qwen2", ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>"),
        ("<tool_call>", "</tool_call>", "<think>"), None, "<|endoftext|>",
        "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n",
        (("add_bos_token", False),), architecture="qwen2",
    ),
    "qwen2-with-llama-3": Imitation(  # a model of Qwen2's class whose vocabulary is another
        "gpt2", "llama-bpe", _LLAMA_3, (), "<|begin_of_text|>", "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>", architecture="qwen2",
    ),
    "r1-distill-qwen": Imitation(
        "gpt2", "deepseek-r1-qwen", _DEEPSEEK,
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜▁pad▁｜>"), *_DEEPSEEK,
        "<｜User｜>{}", "<｜Assistant｜>{}<｜end▁of▁sentence｜>", (("add_bos_token", True),),
        architecture="qwen2",
    ),
    "smollm2": Imitation(
        "gpt2", "smollm", ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>"), (),
        "<|im_start|>", "<|im_end|>", "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n{}<|im_end|>\n", (("add_bos_token", False),),
    ),
    "gpt-oss": Imitation(
        "gpt2", "gpt-4o",
        tuple(f"<|{name}|>" for name in ("startoftext", "endoftext", "return", "start", "end",
                                         "message", "channel", "constrain", "call")),
        (), "<|startoftext|>", "<|return|>", "<|start|>user<|message|>{}<|end|>",
        "<|start|>assistant<|channel|>final<|message|>{}<|return|>", architecture="gpt-oss",
    ),
    "llama-2": Imitation(
        "llama", "default", (), (), "<s>", "</s>", "<s>[INST] {} [/INST]", " {} </s>",
    ),
    "mistral": Imitation(
        "llama", "default", _MISTRAL, (), "<s>", "</s>", "[INST] {}[/INST]", " {}</s>",
        (("add_space_prefix", False),),
    ),
    "phi-3": Imitation(
        "llama", "default", _PHI_3, (), "<s>", "<|endoftext|>", "<|user|>\n{}<|end|>\n",
        "<|assistant|>\n{}<|end|>\n", (("add_bos_token", False),), "Phi 3 Mini", "phi3",
    ),
    "phi-3-by-its-name": Imitation(
        "llama", "default", _PHI_3, ("<|step|>",), "<s>", "<|endoftext|>",
        "<|user|>\n{}<|end|>\n", "<|assistant|>\n{}<|end|>\n", (("add_bos_token", False),),
        "Phi-3 Mini 4k Instruct", "phi3",
    ),
    "gemma": Imitation(
        "llama", "default", ("<start_of_turn>", "<end_of_turn>"),
        ("  ", "    ", "\n\n", "<table>"), "<s>", "</s>", "<start_of_turn>user\n{}<end_of_turn>\n",
        "<start_of_turn>model\n{}<end_of_turn>\n",
        (("add_space_prefix", False), ("add_bos_token", True)), architecture="gemma2",
    ),
}  # fmt: skip


@cache
def _byte_level(size: int = 1500) -> tuple[list[str], list[str]]:
    """The tokens and merges of a BPE whose merges cross all borders of words."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=sorted(ByteLevel.alphabet()),
        max_token_length=6,
    )  # fmt: skip
    return _trained(core, trainer, TEXTS)


@cache
def _sentencepiece(size: int = 1200) -> list[str]:
    """Tokens in the order of their scores, the best first. Many letters are only bytes."""
    trainer = BpeTrainer(vocab_size=size, show_progress=False, max_token_length=6)
    tokens, merges = _trained(
        Tokenizer(BPE()), trainer, ["▁" + text.replace(" ", "▁") for text in TEXTS]
    )
    merged = ["".join(pair.split(" ")) for pair in merges]
    letters = [token for token in tokens if len(token) == 1]
    return [piece for piece in dict.fromkeys((*merged, *letters)) if max(piece) < "\u3000"]


def _trained(core: Tokenizer, trainer: BpeTrainer, texts: list[str]) -> tuple[list[str], list[str]]:
    import json

    core.train_from_iterator(texts * 20, trainer)
    found = json.loads(core.to_str())["model"]
    tokens = sorted(found["vocab"], key=found["vocab"].get)
    return tokens, [" ".join(pair) for pair in found["merges"]]


def write_vocabulary(path: Path, like: Imitation, template: str = "") -> Path:
    """Write a file without tensors, which llama.cpp reads with ``vocab_only``. Returns ``path``."""
    writer = gguf.GGUFWriter(path, like.architecture)
    writer.add_name(like.name)
    writer.add_tokenizer_model(like.model)
    writer.add_tokenizer_pre(like.pre)
    tokens, types, scores = vocabulary_of(like)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if like.model == "llama":
        writer.add_token_scores(scores)
    else:
        writer.add_token_merges(_byte_level()[1])
    if like.bos is not None:
        writer.add_bos_token_id(tokens.index(like.bos))
    if like.eos is not None:
        writer.add_eos_token_id(tokens.index(like.eos))
    for key, value in like.flags:
        add = writer.add_bool if isinstance(value, bool) else writer.add_string
        add(f"tokenizer.ggml.{key}", value)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def vocabulary_of(like: Imitation) -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores, in llama.cpp's order of each kind of model."""
    added = [*like.control, *like.plain]
    kinds = dict.fromkeys(like.control, CONTROL) | dict.fromkeys(like.plain, USER_DEFINED)
    if like.model == "gpt2":
        tokens = [*dict.fromkeys((*_byte_level()[0], *added))]
        return tokens, [kinds.get(token, NORMAL) for token in tokens], []
    kinds |= {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    kinds |= dict.fromkeys(letters, BYTE)
    tokens = [*dict.fromkeys(("<unk>", "<s>", "</s>", *letters, *_sentencepiece(), *added))]
    scores = [-float(i) if token not in kinds else -1000.0 for i, token in enumerate(tokens)]
    return tokens, [kinds.get(token, NORMAL) for token in tokens], scores


def odd_texts(like: Imitation, count: int) -> list[str]:
    """Texts with special tokens, parts of them, blanks and many scripts, joined at random."""
    generator = random.Random(0)
    special = [*like.control, *like.plain, "<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_end|>"]
    parts: Sequence[str] = [
        *special, *(token[:-1] for token in special), *TEXTS, " ", "  ", "\n", "\t", "\u3000", "▁",
        "ø", "é", "e\u0301", "\x00", "\u200d", "�", "x", "A1b2", "\r\n",
    ]  # fmt: skip
    return ["".join(generator.choices(parts, k=generator.randint(1, 5))) for _ in range(count)]


def chat(like: Imitation, turns: int) -> str:
    """A conversation as a template renders it."""
    generator = random.Random(turns)
    return "".join(
        like.user.format(generator.choice(TEXTS)) + like.answer.format(generator.choice(TEXTS))
        for _ in range(turns)
    )


def template_of(like: Imitation) -> str:
    """The chat template that makes such conversations."""
    user, answer = (repr(turn.replace("{}", "\0")) for turn in (like.user, like.answer))
    start = repr(like.answer.partition("{}")[0])
    return (
        "{% for m in messages %}{{ ("
        + f"{user} if m['role'] == 'user' else {answer}).replace('\\0', m['content'])"
        + " }}{% endfor %}{% if add_generation_prompt %}{{ "
        + start
        + " }}{% endif %}"
    )
