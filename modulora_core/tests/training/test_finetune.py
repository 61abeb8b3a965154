"""Finetuning runs on a tiny packed Llama: what is trained, measured, written and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from modulora_core.adapters.lora import LoRASettings, add_lora, load_adapter, save_adapter
from modulora_core.adapters.peft_format import AdapterFolder
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.data import load_examples
from modulora_core.data.sources import pydoc_text
from modulora_core.devices.dense_products import matmul_precision
from modulora_core.errors import (
    AdapterError,
    DataError,
    ModelError,
    OptionError,
    OutputError,
    WorkError,
)
from modulora_core.tests.adapted_models import trained
from modulora_core.tests.tiny_tokenizer import write_jsonl
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune
from modulora_core.training.gradient_checkpointing import checkpoint_activations
from modulora_core.training.losses import loss_in_words
from modulora_core.training.trainer import TrainingStep

Configure = Callable[..., FinetuneConfig]

pytestmark = pytest.mark.usefixtures("one_thread")

ANSWERS = [
    {
        "prompt": "What is it?",
        "completion": " a very long answer, which goes on and on and never ends",
    },
    {"prompt": "Is it?", "completion": " no"},
    {"prompt": "And why would it be so?", "completion": " because it is so"},
    {"prompt": "Who?", "completion": " nobody"},
    {"prompt": "When then?", "completion": " some time, or maybe never"},
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(pydoc_text()[:3000])
    return file


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Prompts and completions of different lengths."""
    return write_jsonl(tmp_path / "answers.jsonl", *ANSWERS)  # type: ignore[no-any-return]


@pytest.fixture
def configure(tunable: Path, text: Path, tmp_path: Path) -> Configure:
    """A config of a short run; options change it."""

    def made(**options: Any) -> FinetuneConfig:
        defaults = {"model": str(tunable), "out": str(tmp_path / "out"), "data": str(text), "batch_size": 2,
                    "grad_accum": 2, "seq_len": 32, "lr": 1e-2}  # fmt: skip
        length = {} if "epochs" in options else {"steps": 4}
        return FinetuneConfig.build({**defaults, **length, **options})

    return made


def mean_loss(model: nn.Module, packed: Path, source: Path, seq_len: int = 32) -> float:
    """Mean over the trained tokens, an example at a time, as anybody would write it with torch alone."""
    examples = load_examples(source, AutoTokenizer.from_pretrained(packed), seq_len=seq_len)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:  # type: ignore[attr-defined]
            logits = model.eval()(torch.tensor([example["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(example["labels"][1:])
            total += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


# what a run does


def test_a_run_learns_and_leaves_a_finished_adapter(
    configure: Configure, text: Path, tunable: Path, tmp_path: Path
) -> None:
    before = mean_loss(load_model(tunable), tunable, text)
    result = finetune(configure(steps=12, eval_data=str(text)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "finetune.yaml",
        "modulora.json",
    ]  # fmt: skip
    model = load_model(tunable)
    load_adapter(model, tmp_path / "out")
    after = mean_loss(model, tunable, text)
    assert after < before - 0.2
    assert result.eval_loss == pytest.approx(after, rel=1e-5), (
        "what was written is what was measured"
    )
    assert (result.out, result.steps, len(result.losses)) == (str(tmp_path / "out"), 12, 12)
    assert result.losses[-1] < result.losses[0] - 0.2
    assert result.peak_memory_bytes > 2**20
    assert json.loads(json.dumps(result.to_json()))["losses"] == result.losses


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(5, 1), (2, 3), (1, 5)])
def test_a_steps_loss_is_the_mean_over_its_trained_tokens_however_it_is_batched(
    configure: Configure, answers: Path, tunable: Path, batch_size: int, grad_accum: int
) -> None:
    """A new adapter changes nothing, so the first loss of a step that takes all data is the base's."""
    result = finetune(configure(data=str(answers), epochs=2, batch_size=batch_size, grad_accum=grad_accum,
                                dropout=0, warmup=0, seq_len=96))  # fmt: skip
    assert result.losses[0] == pytest.approx(
        mean_loss(load_model(tunable), tunable, answers, 96), rel=1e-5
    )
    assert result.steps == 2
    assert result.losses[1] < result.losses[0]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_loss_on_held_out_data_does_not_depend_on_the_batches(
    configure: Configure, answers: Path, tunable: Path, tmp_path: Path, batch_size: int
) -> None:
    told: list[tuple[int, float]] = []
    config = configure(
        eval_data=str(answers), batch_size=batch_size, seq_len=96, steps=3, eval_every=2
    )
    result = finetune(config, on_eval=lambda step, loss: told.append((step, loss)))
    model = load_model(tunable)
    load_adapter(model, tmp_path / "out")
    assert result.eval_loss == pytest.approx(mean_loss(model, tunable, answers, 96), rel=1e-5)
    assert [step for step, _ in told] == [2, 3]
    assert told[-1][1] == result.eval_loss


def test_the_same_seed_gives_the_same_run_and_the_written_file_too(
    configure: Configure, tmp_path: Path
) -> None:
    first = finetune(configure())
    file = tmp_path / "out" / "finetune.yaml"
    again = finetune(FinetuneConfig.build({"out": str(tmp_path / "again")}, file=file))
    other = finetune(FinetuneConfig.build({"out": str(tmp_path / "other"), "seed": 1}, file=file))
    assert again.losses == first.losses
    assert other.losses != first.losses
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_every_step_is_told_with_its_tokens_without_padding(
    configure: Configure, answers: Path, tunable: Path
) -> None:
    told: list[TrainingStep] = []
    result = finetune(configure(data=str(answers), epochs=2, seq_len=96), on_step=told.append)
    examples = load_examples(answers, AutoTokenizer.from_pretrained(tunable), seq_len=96)
    assert [(step.step, step.total) for step in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [step.loss for step in told] == result.losses
    assert told[-1].tokens == 2 * examples.report.tokens
    assert result.tokens_per_second * result.seconds == pytest.approx(2 * examples.report.tokens)


@pytest.mark.parametrize(
    ("scheduler", "after_warmup"),
    [
        ("cosine", lambda share: 0.5 * (1 + math.cos(math.pi * share))),
        ("linear", lambda share: 1 - share),
        ("constant", lambda share: 1.0),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    configure: Configure, scheduler: str, after_warmup: Callable[[float], float]
) -> None:
    told: list[TrainingStep] = []
    finetune(configure(steps=8, warmup=0.25, scheduler=scheduler, lr=1e-3), on_step=told.append)
    shares = [0, 0.5, *(after_warmup(i / 6) for i in range(6))]
    assert [step.learning_rate for step in told] == pytest.approx(
        [1e-3 * share for share in shares]
    )


def test_a_run_of_one_step_trains(configure: Configure, tmp_path: Path) -> None:
    """The default warm-up is a share of the steps, and the first step of a warm-up has a rate of 0."""
    finetune(configure(steps=1))
    assert any(delta.B.abs().max() > 0 for delta in AdapterFolder(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("precision", "expected"), [("highest", "highest"), ("high", "high"), (None, "medium")]
)
def test_products_are_as_precise_as_asked_for_the_time_of_the_run(
    configure: Configure, precision: str | None, expected: str
) -> None:
    told: list[str] = []
    before = torch.get_float32_matmul_precision()
    with matmul_precision("medium"):
        finetune(
            configure(steps=1, matmul_precision=precision),
            on_step=lambda _: told.append(torch.get_float32_matmul_precision()),
        )
        assert torch.get_float32_matmul_precision() == "medium"
    assert told == [expected]
    assert torch.get_float32_matmul_precision() == before


def test_gradient_checkpointing_changes_no_loss_dropout_included(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure(dropout=0.3)
    assert config.gradient_checkpointing, "it is on by default"
    without = configure(dropout=0.3, gradient_checkpointing=False, out=str(tmp_path / "without"))
    assert finetune(config).losses == finetune(without).losses


def test_gradient_checkpointing_keeps_less_for_the_backward(tunable: Path) -> None:
    def kept(checkpointed: bool) -> int:
        model = load_model(tunable)
        add_lora(model, LoRASettings())
        if checkpointed:
            checkpoint_activations(model)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ids = torch.randint(0, 600, (2, 64))
            loss = model.train()(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        return sum(sizes.values())

    dense, checkpointed = kept(False), kept(True)
    assert checkpointed < dense / 2, f"{checkpointed} bytes with, {dense} without"


def test_an_adapter_can_be_trained_on(
    configure: Configure, tunable: Path, answers: Path, tmp_path: Path
) -> None:
    start = trained(
        load_model(tunable), LoRASettings(rank=3, alpha=5, targets=("q_proj", "v_proj"))
    )
    save_adapter(start, tmp_path / "start")
    config = configure(adapter=str(tmp_path / "start"), data=str(answers), epochs=1, batch_size=5,
                       grad_accum=1, dropout=0, warmup=0, seq_len=96)  # fmt: skip
    result = finetune(config)
    assert result.losses == pytest.approx([mean_loss(start, tunable, answers, 96)], rel=1e-5)
    before, after = AdapterFolder(tmp_path / "start"), AdapterFolder(tmp_path / "out")
    assert after.shapes == before.shapes
    assert after.scales == pytest.approx(before.scales)
    assert not any(torch.equal(before[path].B, after[path].B) for path in before)


def test_the_base_stays_as_it_is_and_16_bit_activations_train_a_32_bit_adapter(
    configure: Configure, tunable: Path, tmp_path: Path
) -> None:
    packed = {file.name: file.read_bytes() for file in tunable.iterdir()}
    result = finetune(configure(dtype="bfloat16", steps=8))
    assert result.losses[-1] < result.losses[0]
    assert {delta.A.dtype for delta in AdapterFolder(tmp_path / "out").values()} == {torch.float32}
    assert {file.name: file.read_bytes() for file in tunable.iterdir()} == packed


def test_the_model_card_tells_what_was_done(
    configure: Configure, text: Path, tmp_path: Path
) -> None:
    result = finetune(configure(eval_data=str(text)))
    card = (tmp_path / "out" / "README.md").read_text()
    for told in ("library_name: peft", "for dense", "quantized with toy", loss_in_words(result.losses).capitalize(),
                 f"{result.eval_loss:.4f}", "| lr | 0.01 |", "modulora chat MODEL --adapter"):  # fmt: skip
        assert told in card
    assert "base_model:" not in card, (
        "the Hub would link the name of a local folder to somebody's repository"
    )


def test_peft_runs_the_result_on_the_original_model(
    configure: Configure, tunable: Path, text: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    finetune(configure(steps=8))
    dense = AutoModelForCausalLM.from_pretrained(tunable.parent / "dense")
    before = mean_loss(dense, tunable, text)
    assert (
        mean_loss(PeftModel.from_pretrained(dense, tmp_path / "out"), tunable, text) < before - 0.1
    )


# what is refused, before any work


def _dense(options: dict[str, Any], tunable: Path, out: Path) -> None:
    options["model"] = str(tunable.parent / "dense")


def _foreign(options: dict[str, Any], tunable: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()


def _broken_adapter(options: dict[str, Any], tunable: Path, out: Path) -> None:
    options["adapter"] = str(tunable)


def _options(**changes: Any) -> Callable[[dict[str, Any], Path, Path], None]:
    return lambda options, tunable, out: options.update(changes)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_dense, ModelError, r"it isn't quantized by modulora; quantize it first: modulora quantize .*dense OUT"),
        (_options(model="./nothing"), ModelError, "no such file or folder"),
        (_foreign, OutputError, r"expected it new or empty, found 1 entries \(thesis.tex\)"),
        (_options(seq_len=129), OptionError, "seq_len 129: expected at most 128, the max_position_embeddings"),
        (_options(rank=100_000), OptionError, "rank 100000: expected at most 32, as no adapted layer can"),
        (_options(targets="q_porj"), AdapterError, "no packed layer of that name; did you mean 'q_proj'"),
        (_options(targets="lm_head"), AdapterError, "lm_head is no packed linear layer"),
        (_broken_adapter, AdapterError, "expected adapter_config.json in it, found none"),
        (_options(data="nowhere.jsonl"), DataError, "nowhere.jsonl: expected a file, and there is none"),
        (_options(eval_data="nowhere.jsonl"), DataError, "nowhere.jsonl: expected a file, and there is none"),
    ],
    ids=["dense", "no-model", "foreign", "window", "rank", "target", "head", "adapter", "data", "eval-data"],
)  # fmt: skip
def test_a_bad_request_is_refused_and_nothing_is_written(
    configure: Configure,
    tunable: Path,
    tmp_path: Path,
    spoil: Any,
    error: type[Exception],
    message: str,
) -> None:
    options: dict[str, Any] = {}
    spoil(options, tunable, tmp_path / "out")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        finetune(configure(**options))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in float16")
def test_float16_on_a_cpu_is_refused(configure: Configure) -> None:
    with pytest.raises(OptionError, match="float16: training in it takes a GPU"):
        finetune(configure(dtype="float16"))


def test_a_finished_adapter_is_never_overwritten(configure: Configure) -> None:
    finetune(configure(steps=1))
    with pytest.raises(
        OutputError, match="it holds a finished adapter; choose another name or remove it"
    ):
        finetune(configure(steps=1))
    with pytest.raises(
        OutputError, match=r"nothing left to resume; to train it on, .* give --adapter .*out$"
    ):
        finetune(configure(steps=1), resume=True)


def test_a_loss_that_is_no_number_ends_the_run_without_an_adapter(
    configure: Configure, tmp_path: Path
) -> None:
    with pytest.raises(WorkError, match=r"step \d: the loss is (nan|inf); lower the learning rate"):
        finetune(configure(lr=1e30, max_grad_norm=0, warmup=0))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
