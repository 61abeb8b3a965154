"""Tell at which tokens an answer ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from modulora_core.models.config import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OF_TURNS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<EOT>",
    "_<EOT>", "[EOT]", "<end_of_utterance>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
    "<|tool_response>", "[e~[",
)  # fmt: skip
_OF_TEXTS = (
    "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
_OF_FILES = (
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>",
    "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
)  # fmt: skip
STOP_TOKENS = frozenset((*_OF_TURNS, *_OF_TEXTS, *_OF_FILES))
"""The names of control tokens at which llama.cpp ends an answer."""

_CALLS, _RETURNS = {"<|call|>", "<|calls|>"}, {"<|return|>", "<|flush|>"}
"""In vocabularies with both, such as gpt-oss's, ``<|end|>`` ends a part of an answer only."""


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, *named: int | Iterable[int] | None, size: int | None = None
) -> list[int]:
    """The ids of all tokens that end an answer, sorted.

    They are the EOS tokens of the model and of the tokenizer, and the control tokens of the
    vocabulary in :data:`STOP_TOKENS`, as in llama.cpp.

    Args:
        named: EOS ids by configs: an id, several, or None.
        size: the number of tokens that the model knows; ids beyond are left out.
    """
    found = {tokenizer.eos_token_id} - {None}
    for ids in named:
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    added = getattr(tokenizer, "added_tokens_decoder", {})
    controls = {str(token): i for i, token in added.items() if token.special}
    if _CALLS & controls.keys() and _RETURNS & controls.keys():
        controls.pop("<|end|>", None)
    found |= {i for name, i in controls.items() if name in STOP_TOKENS}
    return sorted(i for i in found if i >= 0 and (size is None or i < size))


def model_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which an answer of ``model`` ends, as :func:`stop_ids`."""
    size = vocabulary_of(model.config)
    return stop_ids(tokenizer, model.generation_config.eos_token_id, size=size)
