"""What an adapter asks of the model that it is put on: room for its rank, a way to be saved, the base it was made for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modulora_core.adapters.lora import (
    LoRASettings,
    adapter_layers,
    add_lora,
    load_adapter,
    save_adapter,
)
from modulora_core.adapters.record import AdapterRecord, describe_base
from modulora_core.calibration import CalibrationConfig, TuningConfig
from modulora_core.checkpoints.checkpoint import load_model
from modulora_core.errors import AdapterError, OptionError
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import logits, trained
from modulora_core.tests.scaled_quantizer import installed, save_model_with_tokenizer

Pack = Callable[..., tuple[Path, Path]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama(pack: Pack) -> nn.Module:
    """Hidden size 32, k_proj and v_proj [16, 32], the MLP's matrices of 32 and 48."""
    return load_model(pack("llama")[1])


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    def told() -> list[str]:
        found = [
            record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
        ]
        caplog.clear()
        return found

    return told


# rank


def test_a_rank_above_every_layers_is_refused_before_anything_changes(llama: nn.Module) -> None:
    with pytest.raises(
        OptionError, match=r"^rank 33: expected at most 32, .*, is \[32, 32\]\); lower the rank"
    ):
        add_lora(llama, LoRASettings(rank=33))
    with pytest.raises(
        OptionError, match=r"^rank 17: expected at most 16, .*k_proj, is \[16, 32\]"
    ):
        add_lora(llama, LoRASettings(rank=17, targets=("k_proj",)))
    assert not list(adapter_layers(llama))


def test_a_rank_above_some_layers_is_one_warning(
    llama: nn.Module, warnings: Callable[[], list[str]]
) -> None:
    add_lora(llama, LoRASettings(rank=16))
    assert warnings() == []
    add_lora(llama, LoRASettings(rank=17), "more")
    (warning,) = warnings()
    assert warning.startswith(
        "rank 17: 4 of 14 adapted layers have fewer rows or columns, as model.layers.0."
    )
    assert "k_proj [16, 32]: the rest of A and B only takes memory" in warning


# save_pretrained


@pytest.mark.parametrize("how", ["made", "loaded"])
def test_a_model_with_an_adapter_is_not_saved_as_a_checkpoint(
    llama: nn.Module, pack: Pack, how: str, tmp_path: Path
) -> None:
    if how == "made":
        add_lora(llama, LoRASettings(rank=2))
    else:
        save_adapter(trained(load_model(pack("llama")[1])), tmp_path / "adapter")
        load_adapter(llama, tmp_path / "adapter")
    with pytest.raises(
        AdapterError, match=r"expected a packed model without an adapter.*save_adapter.*merge"
    ):
        llama.save_pretrained(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_packed_model_without_one_is_saved_and_loaded_again(
    llama: nn.Module, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama))


# tuning


@pytest.fixture(scope="module")
def tunings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """One base, quantized and tuned for some epochs."""
    root = tmp_path_factory.mktemp("tunings")
    source = save_model_with_tokenizer("llama", root / "llama", "float32")

    def packed(epochs: int) -> Path:
        tuning = TuningConfig(epochs=epochs, learning_rate=2e-2) if epochs else None
        if not (root / str(epochs)).exists():
            text = CalibrationConfig(
                "pydoc[:10%]", samples=6, seq_len=32, batch_size=2, tuning=tuning
            )
            quantize(str(source), root / str(epochs), "scaled", calibration=text)
        return root / str(epochs)

    with installed(tmp_path_factory.mktemp("scaled-site")):
        yield packed


@pytest.mark.parametrize(
    ("made_on", "used_on", "whose"),
    [
        (0, 1, "of the second were tuned while it was quantized"),
        (1, 0, "of the first were tuned while it was quantized"),
        (1, 2, "of both were tuned while they were quantized, each"),
    ],
)
def test_norms_that_were_tuned_are_no_other_models(
    tunings: Callable[[int], Path],
    made_on: int,
    used_on: int,
    whose: str,
    tmp_path: Path,
    warnings: Callable[[], list[str]],
) -> None:
    save_adapter(trained(load_model(tunings(made_on))), tmp_path, base="org/base")
    load_adapter(load_model(tunings(made_on)), tmp_path)
    assert warnings() == [], "the same checkpoint"
    load_adapter(load_model(tunings(used_on)), tmp_path)
    (warning,) = warnings()
    assert "trained on org/base quantized with scaled" in warning
    assert f"the unquantized tensors {whose}" in warning
    assert "other weights" not in warning


def test_the_record_says_whether_the_base_was_tuned_and_an_older_one_did_not(
    tunings: Callable[[int], Path],
) -> None:
    for epochs in (0, 1):
        record = AdapterRecord(describe_base(load_model(tunings(epochs)), "base"))
        written: dict[str, Any] = json.loads(json.dumps(record.to_json()))
        assert written["base"]["tuned"] == bool(epochs)
        assert AdapterRecord.from_json(written, "here").base == record.base
        del written["base"]["tuned"]
        assert AdapterRecord.from_json(written, "here").base == replace(record.base, tuned=False)
