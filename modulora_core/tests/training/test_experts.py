"""A mixture of experts is finetuned: trained, resumed, continued."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modulora_core.data import token_segments
from modulora_core.inference.opened import open_to_run
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.stopped_runs import stop_finetune
from modulora_core.tests.tiny_models import tiny_config
from modulora_core.tests.tiny_tokenizer import make_tokenizer
from modulora_core.training.config import FinetuneConfig
from modulora_core.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mixture(toy, tmp_path_factory):
    """The folder of a tiny packed gpt-oss with a tokenizer."""
    root = tmp_path_factory.mktemp("mixture")
    config = tiny_config("gpt_oss")
    config.vocab_size = 600
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(root / "dense")
    make_tokenizer().save_pretrained(root / "dense")
    quantize(str(root / "dense"), root / "packed", "toy")
    return str(root / "packed")


@pytest.fixture
def configure(mixture, text, tmp_path):
    defaults = {"model": mixture, "data": str(text), "batch_size": 2, "grad_accum": 1,
                "seq_len": 32, "lr": 1e-2, "save_every": 2, "steps": 4,
                "baseline": False}  # fmt: skip
    return lambda out, **options: FinetuneConfig.build(
        {**defaults, "out": str(tmp_path / out), **options}
    )


@pytest.mark.slow
def test_a_mixture_is_trained_resumed_and_continued(configure, mixture, text):
    whole, config = finetune(configure("whole")), configure("stopped")
    stop_finetune(config, 3)
    resumed = finetune(config, resume=True)
    assert resumed.losses == whole.losses
    first, second = (
        load_file(Path(out) / "adapter_model.safetensors") for out in (whole.out, resumed.out)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    moved = [key for key in first if "experts" in key and "lora_B" in key and first[key].any()]
    assert len(moved) == 2 * 2, "gate_up and down of two layers"

    continued = finetune(configure("continued", adapter=whole.out, lr=1e-12, dropout=0.0))
    third = load_file(Path(continued.out) / "adapter_model.safetensors")
    assert all(torch.allclose(first[key], third[key], atol=1e-6) for key in first)
    ids = token_segments(text, make_tokenizer(), 32)
    losses = []
    for adapter in (None, whole.out):
        model = open_to_run(mixture, adapter=adapter).load()
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[1] < losses[0]
