"""A packed head and embedding under a budget: they count as packed, and are packed as without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modulora_core.calibration import CalibrationConfig
from modulora_core.checkpoints.checkpoint import load_model, open_checkpoint
from modulora_core.checkpoints.outputs import partial_name
from modulora_core.errors import CheckpointError, OptionError
from modulora_core.layers import TiedHead
from modulora_core.models import open_model
from modulora_core.quantization.mixed import recorded_allocation
from modulora_core.quantization.quantize import Override, QuantizeResult, quantize
from modulora_core.registry import Choice
from modulora_core.tests.mixed_runs import (
    CHOICES,
    run,
    save_uneven_llama,
    stop,
    stored,
    uniform_size,
)
from modulora_core.tests.width_quantizer import installed

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = CalibrationConfig("pydoc[:20%]", samples=4, seq_len=32)
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
ENDS: dict[str, Any] = {
    "head": Choice("plain", {"bits": 8}),
    "embeddings": Choice("plain", {"bits": 2}),
}
"""The head by what is among the choices, the embedding by what isn't."""


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed(tmp_path_factory.mktemp("widths-site")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_uneven_llama(tmp_path_factory.mktemp("source") / "llama")


def saved(source: str, name: str, bits: int) -> int:
    """What packing an end saves, by arithmetic: of its fp32 stay codes, and an fp16 scale for each row."""
    info = open_model(source).parameters[name]
    return info.nbytes - (info.numel * bits // 8 + 2 * info.shape[0])


def size(source: str, bits: int) -> int:
    """Bytes of a checkpoint with these ends and that width everywhere else."""
    return uniform_size(source, bits) - saved(source, HEAD, 8) - saved(source, TABLE, 2)


@pytest.fixture(scope="module")
def made(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizeResult, Path]:
    out = tmp_path_factory.mktemp("made") / "out"
    return run(source, out, size(source, 4), calibration=FEW, **ENDS), out


def test_packed_ends_count_with_their_packed_bytes(
    made: tuple[QuantizeResult, Path], source: str
) -> None:
    result, out = made
    told = result.allocation
    assert told is not None
    assert told["budget"] == size(source, 4)
    assert (
        told["kept_bytes"] + told["ends_bytes"] + told["packed_bytes"]
        == open_checkpoint(out).nbytes
    )
    assert open_checkpoint(out).nbytes <= told["budget"]
    dense = sum(open_model(source).parameters[name].nbytes for name in (HEAD, TABLE))
    assert told["ends_bytes"] == dense - saved(source, HEAD, 8) - saved(source, TABLE, 2)
    assert {name: (end["name"], end["options"]) for name, end in told["ends"].items()} == {
        HEAD: ("plain:bits=8", {"bits": 8}),
        TABLE: ("plain:bits=2", {"bits": 2}),
    }
    assert [choice["uniform_bytes"] for choice in told["choices"]] == [size(source, bits) for bits in (2, 4, 4, 8)]  # fmt: skip
    assert told["budget"] < uniform_size(source, 2), (
        "with dense ends it would be too small for any choice"
    )


def test_its_tensors_are_those_of_quantizing_with_these_choices_and_ends(
    made: tuple[QuantizeResult, Path], source: str, tmp_path: Path
) -> None:
    result, out = made
    assert result.allocation is not None
    choices = result.allocation["choices"]
    overrides = []
    for name, layer in result.allocation["layers"].items():
        chosen = choices[layer["choice"]]
        overrides.append(
            Override(name.removesuffix(".weight"), chosen["quantizer"], chosen["options"])
        )
    quantize(
        source, tmp_path / "same", "plain", overrides=overrides, calibration=FEW, seed=1, **ENDS
    )
    expected, found = (
        load_file(tmp_path / "same" / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert expected.keys() == found.keys()
    assert {f"{HEAD}.codes", f"{TABLE}.codes"} <= found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.isfinite(load_model(out, device="cpu")(torch.tensor([[5, 17, 3]])).logits).all()


def test_the_record_tells_all_of_the_table_but_the_errors(
    made: tuple[QuantizeResult, Path],
) -> None:
    result, out = made
    assert result.allocation is not None
    checkpoint = open_checkpoint(out)
    record = checkpoint.record
    told = recorded_allocation(record, checkpoint.nbytes - record.nbytes)
    errors = {"error", "errors", "bound", "uniform_bytes", "uniform_error"}

    def without_errors(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_errors(item) for key, item in value.items() if key not in errors}
        return [without_errors(item) for item in value] if isinstance(value, list) else value

    assert told == without_errors(result.allocation)
    used = {record.recipes[site.recipe].options["bits"] for _, site in record.items()}
    assert {recipe.options["bits"] for recipe in record.recipes} == used, (
        "none that nothing is packed by"
    )


def test_the_table_of_a_tied_model_counts_once(tmp_path: Path) -> None:
    tied = save_uneven_llama(tmp_path / "tied", "llama-tied")
    largest = uniform_size(tied, 8) - saved(tied, TABLE, 8)
    result = run(
        tied, tmp_path / "out", 2**30, choices=CHOICES[1::2], calibration=FEW, head=ENDS["head"]
    )
    assert result.bytes == largest == open_checkpoint(tmp_path / "out").nbytes
    assert isinstance(load_model(tmp_path / "out", device="cpu").lm_head, TiedHead)


def test_the_least_budget_counts_the_ends(source: str, tmp_path: Path) -> None:
    least = size(source, 2)
    named = rf"at least {least} bytes .* lm_head by plain:bits=8, model.embed_tokens by plain:bits=2 0\.\d\d MiB, and the smallest"
    with pytest.raises(OptionError, match=named):
        run(source, tmp_path / "out", least - 1, calibration=FEW, **ENDS)
    assert not list(tmp_path.iterdir())
    assert (
        run(source, tmp_path / "out", least, calibration=FEW, choices=CHOICES[:2], **ENDS).bytes
        == least
    )


def test_an_end_by_a_quantizer_that_needs_calibration_is_refused(
    source: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="--quantize-head heeding: it needs calibration"):
        run(source, tmp_path / "out", 2**30, head=Choice("heeding"))
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_to_the_same_bytes_and_notices_other_ends(
    source: str, made: tuple[QuantizeResult, Path], tmp_path: Path
) -> None:
    budget, out = size(source, 4), tmp_path / "out"
    stop(source, out, budget, after=14 + 3, calibration=FEW, **ENDS)
    assert '"lm_head.weight' in (partial_name(out) / "written.jsonl").read_text(), "ends come first"
    for other in (
        {"head": Choice("plain", {"bits": 4})},
        {"embeddings": Choice("plain", {"bits": 1})},
    ):
        with pytest.raises(CheckpointError, match=r"differs in ends\)"):
            run(source, out, budget, calibration=FEW, resume=True, **(ENDS | other))
    run(source, out, budget, calibration=FEW, resume=True, **ENDS)
    assert stored(out) == stored(made[1])
