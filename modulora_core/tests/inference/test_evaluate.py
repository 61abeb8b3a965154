from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma2Config, GenerationConfig, LlamaConfig

from modulora_core.data import load_examples, token_segments
from modulora_core.errors import DataError, MissingExtraError, OptionError, WorkError
from modulora_core.inference.evaluate import accuracy, perplexity, rouge
from modulora_core.tests.tiny_tokenizer import (
    SMOL_FILE,
    make_tokenizer,
    smol_folder,
    smol_tokenizer,
    write_jsonl,
)
from modulora_core.training import chunked_loss

SIZES = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # fmt: skip
ASKED = [
    ("Is it good?", " yes"),
    ("Is it bad, then?", " no"),
    ("Really?", " yes"),
    ("So?", " not at all"),
]


def tiny(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for (
        parameter
    ) in model.parameters():  # far from uniform, so that no two answers are equally likely
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def llama():
    return tiny(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def segments(plain):
    return token_segments("pydoc[:10%]", plain, 48, 5)


@pytest.fixture(scope="module")
def smol():
    transformers.utils.logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        smol_folder(), gguf_file=SMOL_FILE, dtype=torch.float32
    ).eval()


@pytest.fixture
def asked(tmp_path):
    return write_jsonl(
        tmp_path / "asked.jsonl", *({"prompt": p, "completion": c} for p, c in ASKED)
    )


def plain_loop(model, segments):
    """What anybody would write with transformers alone, a segment at a time, but for the sum over the vocabulary, which is made in float64.

    In fp32 torch's is off by up to 2e-5 with a vocabulary of 49,152, by how much depends on the processor.
    """
    with torch.no_grad():
        log_p = [model(row[None]).logits[0, :-1].double().log_softmax(-1) for row in segments]
    losses = [
        -of.gather(-1, row[1:, None]).mean().item() for of, row in zip(log_p, segments, strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


# ------------------------------------------------------------------------------------------------- perplexity


def test_perplexity_is_that_of_a_plain_loop(llama, segments):
    found = perplexity(llama, segments)
    assert found.perplexity == pytest.approx(plain_loop(llama, segments), rel=1e-6)
    assert found.nll == pytest.approx(math.log(found.perplexity))
    assert (found.segments, found.tokens) == (5, 5 * 47)


def test_perplexity_of_smollm2_is_that_of_a_plain_loop(smol):
    segments = token_segments("pydoc[90%:]", smol_tokenizer(), 128, 2)
    assert perplexity(smol, segments).perplexity == pytest.approx(
        plain_loop(smol, segments), rel=1e-6
    )


def test_perplexity_counts_a_cap_on_the_logits(segments):
    model = tiny(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0))
    assert perplexity(model, segments).perplexity == pytest.approx(
        plain_loop(model, segments), rel=1e-6
    )


@pytest.mark.parametrize("batch_size", [2, 5, 9])
def test_perplexity_does_not_depend_on_the_batch(llama, segments, batch_size):
    whole = perplexity(llama, segments)
    assert perplexity(llama, segments, batch_size=batch_size).nll == pytest.approx(
        whole.nll, rel=1e-6
    )


@pytest.mark.parametrize("rows", [1, 7, 46, 47])
def test_perplexity_does_not_depend_on_the_rows_of_logits_at_a_time(
    llama, segments, monkeypatch, rows
):
    whole = perplexity(llama, segments)
    monkeypatch.setattr(chunked_loss, "CPU_LOGIT_BYTES", rows * 4 * 600)
    assert perplexity(llama, segments).nll == pytest.approx(whole.nll, rel=1e-6)


def test_perplexity_sums_in_fp32_for_a_bf16_model(llama, segments):
    with torch.no_grad():
        logits = llama.bfloat16()(segments).logits.double()
    log_p = logits.log_softmax(-1)[:, :-1].gather(-1, segments[:, 1:, None])
    assert perplexity(llama, segments, batch_size=5).nll == pytest.approx(
        -log_p.mean().item(), rel=1e-5
    )


def test_every_module_keeps_its_mode_and_no_gradient_is_made(llama, segments):
    llama.train()
    llama.model.layers[1].eval()
    before = {name: module.training for name, module in llama.named_modules()}
    seen = []
    handle = llama.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(
            (module.training, output.requires_grad, output.is_inference())
        )
    )
    perplexity(llama, segments[:1])
    handle.remove()
    assert seen == [(False, False, False)]
    assert {name: module.training for name, module in llama.named_modules()} == before


def test_the_mode_is_restored_after_an_error(llama, segments):
    llama.train()
    llama.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(
        WorkError, match="expected finite logits, got NaN or Inf in segments from 0 on"
    ):
        perplexity(llama, segments)
    assert llama.training


def test_progress_is_told_what_is_done(llama, segments):
    told = []
    perplexity(
        llama, segments, batch_size=2, progress=lambda what, done, total: told.append((done, total))
    )
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_segments_that_can_not_be_predicted_are_refused(llama, segments):
    for wrong in (segments[0], segments[:0], segments[:, :1]):
        with pytest.raises(
            DataError, match=r"segments: expected shape \[n >= 1, seq_len >= 2\], got"
        ):
            perplexity(llama, wrong)
    with pytest.raises(
        OptionError, match="seq_len 144: expected at most the model's window of 128 tokens"
    ):
        perplexity(llama, segments[:3].reshape(1, -1))
    with pytest.raises(OptionError, match="batch_size: expected at least 1, got 0"):
        perplexity(llama, segments, batch_size=0)


# --------------------------------------------------------------------------------------------------- accuracy


def likeliest(model, tokenizer, prompt):
    """The answer of ASKED with the largest log-likelihood, closed by EOS, each in a pass of its own."""

    def score(answer):
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        return sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids)))

    return max(sorted({answer for _, answer in ASKED}), key=score)


@pytest.mark.parametrize("batch_size", [1, 5, 99])
def test_accuracy_ranks_all_answers_by_their_whole_likelihood(llama, plain, asked, batch_size):
    picked = [likeliest(llama, plain, prompt) for prompt, _ in ASKED]
    correct = sum(pick == answer for pick, (_, answer) in zip(picked, ASKED, strict=True))
    found = accuracy(llama, plain, asked, batch_size=batch_size)
    assert (found.correct, found.examples, found.accuracy) == (correct, 4, correct / 4)
    assert found.labels == (" no", " not at all", " yes")


def test_a_model_that_has_learned_the_labels_is_right(llama, plain, asked):
    """Overfitted on the training examples of the same file: what is trained is what is measured."""
    examples = load_examples(asked, plain, seq_len=64)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
    for _ in range(30):
        for example in examples:
            ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
            llama(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(llama, plain, asked).accuracy == 1.0
    pytest.importorskip("rouge_score")
    assert rouge(llama, plain, asked, 8).rougeL == 1.0


def test_smollm2_knows_capitals(smol, tmp_path):
    rows = [("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome"), ("Egypt", "Cairo")]
    source = write_jsonl(
        tmp_path / "d.jsonl",
        *({"text": f"Name the capital of {a}, in one word.", "label": b} for a, b in rows),
    )
    found = accuracy(smol, smol_tokenizer(), source)
    assert found.labels == ("Cairo", "Paris", "Rome", "Tokyo")
    assert found.correct >= 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "line 1: expected prompts and answers, got text"),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            "line 1: accuracy: .* got a chat",
        ),
        ([{"text": "a", "label": 1}], "accuracy: expected 2 to 64 distinct labels, got 1"),
        (
            [{"text": "a", "label": i} for i in range(65)],
            "accuracy: expected 2 to 64 distinct labels, got 65",
        ),
        (
            [{"text": "a", "label": 0}, {"text": "a " * 130, "label": 1}],
            "line 2: .* window of 128 tokens, got",
        ),
    ],
)
def test_what_has_no_labels_is_refused(llama, plain, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        accuracy(llama, plain, write_jsonl(tmp_path / "d.jsonl", *rows))


# ------------------------------------------------------------------------------------------------------ rouge


def test_rouge_scores_what_plain_greedy_generation_writes(smol, tmp_path):
    """Prompts of different lengths, asked as a chat asks them; batches are padded on the left."""
    scorer_module = pytest.importorskip("rouge_score.rouge_scorer")
    tokenizer = smol_tokenizer()
    rows = [
        ("What is the capital of France?", "The capital of France is Paris, a city."),
        ("Repeat the word apple three times, with spaces and nothing else.", "apple apple apple"),
        ("Who wrote Hamlet?", "It was written by William Shakespeare."),
    ]
    source = write_jsonl(tmp_path / "d.jsonl", *({"instruction": a, "output": b} for a, b in rows))
    scorer = scorer_module.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    expected = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for question, answer in rows:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        out = smol.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        for kind, score in scorer.score(answer, text).items():
            expected[kind] += score.fmeasure / len(rows)
    found = rouge(smol, tokenizer, source, 12, batch_size=3)
    assert found.examples == 3
    assert {kind: getattr(found, kind) for kind in expected} == pytest.approx(expected)
    assert 0 < found.rouge2 < found.rouge1 < 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rouge_is_greedy_whatever_the_models_own_generation_says(
    llama, plain, tmp_path, batch_size
):
    """The file's answers are what the model writes greedily: any other text scores less than 1."""
    pytest.importorskip("rouge_score")
    rows = []
    for prompt, _ in ASKED:
        ids = plain(prompt, return_tensors="pt")["input_ids"]
        out = llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        rows.append({"prompt": prompt, "completion": plain.decode(out[0, ids.shape[1] :])})
    source = write_jsonl(tmp_path / "d.jsonl", *rows)
    llama.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        top_p=0.5,
        repetition_penalty=9.0,
        num_beams=2,
        eos_token_id=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rouge(llama, plain, source, 20, batch_size=batch_size).rougeL == 1.0


def test_rouge_refuses_before_it_writes(llama, plain, asked, monkeypatch):
    pytest.importorskip("rouge_score")
    with pytest.raises(
        DataError, match="line 1: expected at most the model's window of 128 tokens"
    ):
        rouge(llama, plain, asked, 128)
    with pytest.raises(OptionError, match="max_new_tokens: expected at least 1, got 0"):
        rouge(llama, plain, asked, 0)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(
        MissingExtraError, match=r"rouge-score.*pip install 'modulora-core\[evaluation\]'"
    ):
        rouge(llama, plain, asked)
