"""Finetuning runs on a tiny packed Llama: their results, their files, and refused requests."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, TrainerCallback

from modulora_core.data import load_examples
from modulora_core.errors import (
    AdapterError,
    MissingExtraError,
    ModelError,
    OptionError,
    OutputError,
    WorkError,
)
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.peft_format import read_adapter
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.settings import LoRASettings
from modulora_core.models.installed_formats import file_format
from modulora_core.tests.adapted_models import trained
from modulora_core.tests.tiny_tokenizer import write_jsonl
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")

ANSWERS = {
    "What is it?": " a very long answer, which goes on and on and never ends",
    "Is it?": " no",
    "And why would it be so?": " because it is so",
    "Who?": " nobody",
    "When then?": " some time, or maybe never",
}
WEIGHTS = "adapter_model.safetensors"
ROWS = [{"prompt": f"{word}?", "completion": f" {word}"} for word in ("yes", "no", "so", "now")]


@pytest.fixture
def answers(tmp_path):
    """Prompts and completions of different lengths."""
    rows = ({"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items())
    return write_jsonl(tmp_path / "answers.jsonl", *rows)


def mean_loss(model, packed, source, seq_len=32):
    """Mean over the trained tokens, one example at a time, by torch alone."""
    examples = load_examples(source, AutoTokenizer.from_pretrained(packed), seq_len=seq_len)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = model.eval()(torch.tensor([example["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(example["labels"][1:])
            total += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


# a run's results


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_a_run_learns_and_leaves_a_finished_adapter(configure, text, tunable, tmp_path, options):
    packed = {file.name: file.read_bytes() for file in tunable.iterdir()}
    before = mean_loss(load_model(tunable), tunable, text)
    result = finetune(configure(steps=12, eval_data=str(text), baseline=True, **options))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", WEIGHTS, "checkpoints", "finetune.yaml",
        "log.json", "modulora.json",
    }  # fmt: skip
    model = load_model(tunable)
    load_adapter(model, tmp_path / "out")
    after = mean_loss(model, tunable, text)
    assert after < before - 0.2
    assert result.eval_loss == pytest.approx(after, rel=1e-2 if options else 1e-5)
    assert (result.out, result.steps, len(result.losses)) == (str(tmp_path / "out"), 12, 12)
    assert result.losses[-1] < result.losses[0] - 0.2
    assert json.loads(json.dumps(result.to_json()))["losses"] == result.losses
    deltas = read_adapter(tmp_path / "out").deltas.values()
    assert {delta.A.dtype for delta in deltas} == {torch.float32}
    assert {file.name: file.read_bytes() for file in tunable.iterdir()} == packed


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(5, 1), (2, 3), (1, 5)])
def test_losses_are_means_over_tokens_for_any_batches(
    configure, answers, tunable, tmp_path, batch_size, grad_accum
):
    """A step takes all data, so its first loss is the base's; a new adapter changes nothing."""
    evaluations = []
    steps = []
    config = configure(data=str(answers), eval_data=str(answers), eval_every=1, epochs=2,
                       batch_size=batch_size, grad_accum=grad_accum, dropout=0, warmup=0,
                       seq_len=96)  # fmt: skip
    result = finetune(config, on_step=steps.append, on_eval=lambda *e: evaluations.append(e))
    base = mean_loss(load_model(tunable), tunable, answers, 96)
    model = load_model(tunable)
    load_adapter(model, tmp_path / "out")
    assert result.losses[0] == pytest.approx(base, rel=1e-5)
    assert result.eval_loss == pytest.approx(mean_loss(model, tunable, answers, 96), rel=1e-5)
    assert [step for step, _ in evaluations] == [1, 2]
    assert evaluations[-1][1] == result.eval_loss
    tokens = load_examples(
        answers, AutoTokenizer.from_pretrained(tunable), seq_len=96
    ).report.tokens
    assert [(s.step, s.total, s.loss) for s in steps] == [(1, 2, result.losses[0]),
                                                          (2, 2, result.losses[1])]  # fmt: skip
    assert [step.tokens for step in steps] == [tokens, 2 * tokens]
    assert result.tokens_per_second * result.seconds == pytest.approx(2 * tokens)


def test_the_written_config_repeats_the_run(configure, tmp_path):
    first = finetune(configure())
    file = tmp_path / "out" / "finetune.yaml"
    again = finetune(FinetuneConfig.build({"out": str(tmp_path / "again")}, file=file))
    other = finetune(FinetuneConfig.build({"out": str(tmp_path / "other"), "seed": 1}, file=file))
    assert again.losses == first.losses
    assert other.losses != first.losses
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()


def test_a_run_of_one_step_trains(configure, tmp_path):
    """The first step of a warm-up has a rate of 0, so the default warm-up must round down to 0."""
    finetune(configure(steps=1))
    deltas = read_adapter(tmp_path / "out").deltas
    assert any(delta.B.abs().max() > 0 for delta in deltas.values())


def test_options_that_save_memory_change_no_loss(configure, tmp_path):
    expected = finetune(configure(dropout=0.3)).losses
    for name, options in {
        "without": {"gradient_checkpointing": False},
        "kept": {"keep_products": True},
    }.items():
        config = configure(dropout=0.3, out=str(tmp_path / name), **options)
        assert finetune(config).losses == expected, name


def test_an_adapter_can_be_continued(configure, tunable, answers, tmp_path):
    settings = LoRASettings(rank=3, alpha=5, targets=("q_proj", "v_proj"))
    start = trained(load_model(tunable), settings)
    save_adapter(start, tmp_path / "start")
    config = configure(adapter=str(tmp_path / "start"), data=str(answers), epochs=1, batch_size=5,
                       grad_accum=1, dropout=0, warmup=0, seq_len=96)  # fmt: skip
    result = finetune(config)
    assert result.losses == pytest.approx([mean_loss(start, tunable, answers, 96)], rel=1e-5)
    before, after = (read_adapter(tmp_path / name).deltas for name in ("start", "out"))
    assert before.keys() == after.keys()
    for path, delta in after.items():
        assert (delta.shape, delta.rank) == (before[path].shape, 3)
        assert delta.scale == pytest.approx(5 / 3)
        assert not torch.equal(delta.B, before[path].B)


# channel scales


def test_scales_train_without_weight_decay_and_can_be_continued(configure, tmp_path):
    options = {"train_scales": True, "steps": 8, "grad_accum": 1, "save_every": 4}
    result = finetune(configure(**options))
    assert result.losses[-1] < result.losses[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "modulora_scales.safetensors. PEFT warns and ignores" in card
    assert "library_name: peft" not in card
    before = read_adapter(tmp_path / "out").deltas
    assert read_adapter(tmp_path / "out" / "checkpoints" / "checkpoint-4").has_channel_scales
    # decay alone takes matrices to zero in one step: 1 - lr × decay = 0
    config = configure(out=str(tmp_path / "further"), adapter=str(tmp_path / "out"), steps=1,
                       warmup=0, lr=1e-6, weight_decay=1e6, scheduler="constant")  # fmt: skip
    finetune(config)
    for path, delta in read_adapter(tmp_path / "further").deltas.items():
        assert delta.A.abs().max() < 1e-5
        for kind in ("input", "output"):
            old, new = (
                getattr(before[path].channel_scales, kind),
                getattr(delta.channel_scales, kind),
            )
            assert 1e-3 < (old - 1).abs().max() < 0.1, "8 steps of Adam go no further than 0.08"
            assert 0 < (new - old).abs().max() < 1e-5


# warnings


def test_a_short_epoch_suggests_more_steps(configure, tmp_path, caplog):
    chats = ({"prompt": "a", "completion": " b" * 100} for _ in range(12))
    data = str(write_jsonl(tmp_path / "chats.jsonl", *chats))
    common = {"data": data, "batch_size": 2, "grad_accum": 2, "seq_len": 128}
    unset = FinetuneConfig.build({**configure().model_dump(), "steps": None, **common})
    finetune(unset)
    (warning,) = caplog.messages
    assert warning.startswith("steps: one epoch of 12 examples is 3 steps, which change little")
    assert "--steps N" in warning
    caplog.clear()
    finetune(configure(**common, epochs=1, out=str(tmp_path / "asked")))
    assert caplog.messages == []


def test_a_run_that_diverged_warns_and_still_finishes(configure, tmp_path, caplog):
    (tmp_path / "easy.txt").write_text("the cat and " * 400)
    easy = {"data": str(tmp_path / "easy.txt"), "grad_accum": 1}
    # random weights are worse than a uniform guess
    finetune(configure(**easy, out=str(tmp_path / "good"), steps=20, lr=3e-2))
    assert caplog.messages == []
    good = str(tmp_path / "good")
    finetune(configure(**easy, adapter=good, lr=1.0, steps=2, max_grad_norm=0))
    _, rate, warning = caplog.messages
    assert rate.startswith("lr 1: it is 1e+03 times the default, 0.001; ")
    assert warning.startswith(f"{tmp_path / 'out'}: the loss was ")
    assert warning.endswith(": the adapter makes the model worse; lower the learning rate (lr 1)")
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_records_train_as_a_file_of_them_does(configure, tmp_path):
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(ROWS).to_json(file)
    expected = finetune(configure(data=str(file), steps=2, dropout=0)).losses
    for number, rows in enumerate((ROWS, datasets.Dataset.from_list(ROWS))):
        out = tmp_path / str(number)
        config = configure(data=None, out=str(out), steps=2, dropout=0, eval_every=1)
        result = finetune(config, data=rows, eval_data=rows)
        assert result.losses == expected
        assert result.eval_loss is not None
        assert "Data: 4 records." in (out / "README.md").read_text()
    with pytest.raises(OptionError, match="data: expected it in the config or beside it, got both"):
        finetune(configure(), data=ROWS)
    with pytest.raises(OptionError, match="data: expected training data, got none"):
        finetune(configure(data=None))


# refused before any work


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "{dense}"}, ModelError, "quantize it first: modulora quantize"),
        ({"seq_len": 129}, OptionError, "seq_len 129: expected at most 128, the context of"),
        ({"targets": "q_porj"}, AdapterError, "did you mean 'q_proj'"),
        ({"targets": "lm_head"}, AdapterError, "and lm_head is none"),
        ({"eval_every": 2}, OptionError, "eval_every is 2: expected eval_data, got none"),
        ({"optim": "adamw_torhc"}, OptionError, "no such optimizer; expected adamw_torch"),
        ({"trainer": {"adam_beta1": 5.0}}, OptionError, "trainer: Invalid beta parameter"),
        ({"optim": "galore_adamw"}, MissingExtraError, "galore_torch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_request_is_refused_and_nothing_is_written(
    configure, tunable, tmp_path, options, error, message
):
    places = {"packed": tunable, "dense": tunable.parent / "dense"}
    options = {k: v.format(**places) if isinstance(v, str) else v for k, v in options.items()}
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        finetune(configure(**options))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do these")
@pytest.mark.parametrize("option", [{"dtype": "float16"}, {"offload_activations": True}])
def test_options_for_a_gpu_are_refused_on_a_cpu(configure, option):
    with pytest.raises(OptionError, match=f"^{next(iter(option))}.*: expected a GPU"):
        finetune(configure(**option))


def test_a_finished_adapter_is_never_overwritten(configure):
    finetune(configure(steps=1))
    with pytest.raises(OutputError, match="it holds a finished adapter; choose another name or"):
        finetune(configure(steps=1))
    with pytest.raises(OutputError, match=r"another run \(lr .*; to continue .* --adapter .*out$"):
        finetune(configure(steps=1, lr=0.5), resume=True)


def test_a_finished_run_says_so_when_it_is_resumed(configure, caplog):
    first = finetune(configure(steps=1))
    before = {path: path.read_bytes() for path in Path(first.out).rglob("*") if path.is_file()}
    with caplog.at_level("INFO", logger="modulora_core"):
        again = finetune(configure(steps=1), resume=True)
    assert (again.steps, again.losses) == (0, [])
    assert "it is finished; nothing is left to resume" in caplog.text
    assert before == {p: p.read_bytes() for p in Path(first.out).rglob("*") if p.is_file()}


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = True


def test_a_run_that_wrote_its_file_is_finished_too(configure, tmp_path):
    """The file exists then, which is refused before any other run."""
    from modulora_toy.single import SingleWriter

    model, lora = tmp_path / "model.single", tmp_path / "lora.single"
    writer = SingleWriter(file_format(model).spec)
    config = configure(steps=1, lora_file=str(lora))
    writer.merge(config.model, model, progress=False)
    config = config.model_copy(update={"model": str(model)})
    assert finetune(config).files == (str(lora),)
    assert load_file(lora).keys() >= {"model.layers.0.mlp.up_proj.A"}
    assert finetune(config, resume=True).steps == 0
    stopped, file = tmp_path / "stopped", tmp_path / "stopped.single"
    changed = {"out": str(stopped), "lora_file": str(file), "steps": 3}
    stop = _Stop()  # transformers saves no checkpoint where a callback stops the training
    result = finetune(config.model_copy(update=changed), callbacks=[stop])
    assert (result.steps, result.files) == (1, (str(file),))
    assert not list((stopped / "checkpoints").glob("*/*.safetensors"))
    with pytest.raises(OutputError, match=r"expected a new file called .*, got a file that"):
        finetune(config.model_copy(update={"out": str(tmp_path / "other")}))


def test_a_folder_that_is_removed_during_the_run_is_an_error_at_its_end(configure):
    config = configure(steps=2)
    with pytest.raises(OutputError, match=r"somebody removed it, .* it has the adapter again"):
        finetune(config, on_step=lambda _: shutil.rmtree(config.out, ignore_errors=True))
    assert (Path(config.out) / "adapter_config.json").is_file()


def test_a_loss_that_is_no_number_ends_the_run_without_an_adapter(configure, tmp_path):
    with pytest.raises(WorkError, match=r"step \d: the loss is (nan|inf); lower the learning rate"):
        finetune(configure(lr=1e30, max_grad_norm=0, warmup=0))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
