"""Perplexity, accuracy and ROUGE equal what transformers alone computes, for any batches."""

import math
import sys
import warnings

import pytest
import torch
from modulora_evaluate.evaluate import accuracy, evaluate, perplexity, rouge
from modulora_evaluate.passes import asked_in
from transformers import AutoModelForCausalLM, Gemma2Config, GenerationConfig, LlamaConfig

from modulora_core.data import token_segments
from modulora_core.errors import DataError, MissingExtraError, OptionError, WorkError
from modulora_core.inference.opened import open_to_run
from modulora_core.models.generation import Sampling
from modulora_core.tests.tiny_tokenizer import make_tokenizer, write_jsonl
from modulora_core.training import chunked_loss

SIZES = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # fmt: skip
ASKED = {"Is it good?": " yes", "Is it bad, then?": " no", "Really?": " yes", "So?": " not at all"}


def tiny(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # far from uniform, so that no two answers tie
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


@pytest.fixture
def asked(tmp_path):
    rows = ({"prompt": prompt, "completion": answer} for prompt, answer in ASKED.items())
    return write_jsonl(tmp_path / "asked.jsonl", *rows)


def plain_loop(model, segments):
    """One segment at a time by transformers alone; the log-softmax is in float64."""
    with torch.no_grad():
        log_p = [model(row[None]).logits[0, :-1].double().log_softmax(-1) for row in segments]
    losses = [
        -of.gather(-1, row[1:, None]).mean().item() for of, row in zip(log_p, segments, strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


# perplexity


@pytest.mark.parametrize("kind", ["llama", "soft cap", "bfloat16"])
def test_perplexity_equals_a_plain_loop(llama, segments, kind):
    model = llama.bfloat16() if kind == "bfloat16" else llama
    if kind == "soft cap":
        model = tiny(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0))
    found = perplexity(model, segments)
    assert found.perplexity == pytest.approx(plain_loop(model, segments), rel=1e-5)
    assert found.nll == pytest.approx(math.log(found.perplexity))
    assert (found.segments, found.tokens) == (5, 5 * 47)


@pytest.mark.parametrize(("batch_size", "rows"), [(2, 1), (5, 7), (9, 46)])
def test_perplexity_does_not_depend_on_batches_and_chunks(
    llama, segments, monkeypatch, batch_size, rows
):
    whole = perplexity(llama, segments)
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES_CPU", rows * 4 * 600)
    found = perplexity(llama, segments, batch_size=batch_size)
    assert found.nll == pytest.approx(whole.nll, rel=1e-6)


def test_every_module_keeps_its_mode_and_nothing_is_saved_for_a_backward(llama, segments):
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
    llama.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(WorkError, match="expected finite logits, got NaN or Inf in segments from"):
        perplexity(llama, segments)
    assert {name: module.training for name, module in llama.named_modules()} == before


# accuracy


def likeliest(model, tokenizer, prompt):
    """The answer with the largest log-likelihood, closed by EOS, each in its own forward."""

    def score(answer):
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        return sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids)))

    return max(sorted(set(ASKED.values())), key=score)


@pytest.mark.parametrize("batch_size", [1, 5, 99])
def test_accuracy_ranks_answers_by_their_whole_likelihood(llama, plain, asked, batch_size):
    correct = sum(likeliest(llama, plain, prompt) == ASKED[prompt] for prompt in ASKED)
    found = accuracy(llama, plain, asked_in(asked), batch_size=batch_size)
    assert (found.correct, found.examples, found.accuracy) == (correct, 4, correct / 4)
    assert found.labels == (" no", " not at all", " yes")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "line 1: expected prompts and answers, got text"),
        (
            [
                {"prompt": "a", "completion": " b"},
                {"prompt": [{"role": "user", "content": "a"}], "completion": " c"},
            ],
            "line 2: accuracy: .* got a chat",
        ),
        ([{"text": "a", "label": 1}], "expected 2 to 64 distinct labels .*, got 1"),
        ([{"text": "a", "label": i} for i in range(65)], "2 to 64 distinct labels .*, got 65"),
        (
            [{"text": "a", "label": 0}, {"text": "a " * 130, "label": 1}],
            "line 2: .* window of 128 tokens, got",
        ),
    ],
    ids=["text", "mixed", "one", "many", "long"],
)
def test_data_without_labels_is_refused(llama, plain, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        accuracy(llama, plain, asked_in(write_jsonl(tmp_path / "d.jsonl", *rows)))


# ROUGE


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rouge_scores_greedy_answers_for_any_generation_config(llama, plain, tmp_path, batch_size):
    """The data has the model's greedy answers; one of them has more words."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(
        ["rouge1", "rouge2", "rougeL"], use_stemmer=True
    )
    rows, expected = [], {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for prompt in ASKED:
        ids = plain(prompt, return_tensors="pt")["input_ids"]
        out = llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        text = plain.decode(out[0, ids.shape[1] :])
        answer = f"{text} and more words" if prompt == "So?" else text
        rows.append({"prompt": prompt, "completion": answer})
        for kind, score in scorer.score(answer, text).items():
            expected[kind] += score.fmeasure / len(ASKED)
    source = write_jsonl(tmp_path / "d.jsonl", *rows)
    llama.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=9.0, num_beams=2,
        eos_token_id=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rouge(llama, plain, asked_in(source), Sampling(20), batch_size=batch_size)
    assert {kind: getattr(found, kind) for kind in expected} == pytest.approx(expected)
    assert found.examples == 4
    assert 0.5 < found.rouge2 < 1


def test_rouge_refuses_before_it_generates(llama, plain, asked, monkeypatch):
    pytest.importorskip("rouge_score")
    with pytest.raises(DataError, match="line 1: expected at most the model's window of 128"):
        rouge(llama, plain, asked_in(asked), Sampling(128))
    with pytest.raises(OptionError, match="max_new_tokens: expected at least 1, got 0"):
        rouge(llama, plain, asked_in(asked), Sampling(0))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'modulora-evaluate\[rouge\]'"):
        rouge(llama, plain, asked_in(asked), Sampling())


# evaluate


def test_records_are_evaluated(tunable, tmp_path):
    text = "The with statement wraps a block. " * 9
    (tmp_path / "text.txt").write_text(f"{text}\n\n{text}")
    expected = evaluate(str(tunable), tmp_path / "text.txt", seq_len=32)
    assert evaluate(str(tunable), [{"text": text}, {"text": text}], seq_len=32) == expected


@pytest.mark.parametrize("first", ['{"a": 1}', "{}"])
def test_a_file_of_other_fields_is_refused_after_its_first_record(tmp_path, first):
    (tmp_path / "data.jsonl").write_text(f"{first}\n{{\n")  # line 2 is no JSON
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: "):
        asked_in(str(tmp_path / "data.jsonl"))


def test_evaluate_takes_a_name_an_opened_and_a_loaded_model(tunable, asked):
    opened = open_to_run(str(tunable))
    calls = []
    found = [
        evaluate(model, "pydoc[:1%]", seq_len=32, segments=3, batch_size=2, progress=progress)
        for model, progress in (
            (str(tunable), True),
            (opened, lambda *call: calls.append(call)),
            ((opened.load(), opened.tokenizer), False),
        )
    ]
    assert found[0] == found[1] == found[2]
    assert calls == [("evaluating", 2, 3), ("evaluating", 3, 3)]
    measured = evaluate(opened, asked, metric="accuracy")
    assert measured == accuracy(opened.load(), opened.tokenizer, asked_in(asked))
    pytest.importorskip("rouge_score")
    measured = evaluate(opened, asked, metric="rouge", max_new_tokens=4)
    sampling = Sampling(max_new_tokens=4)
    assert measured == rouge(opened.load(), opened.tokenizer, asked_in(asked), sampling)
