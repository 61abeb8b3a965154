"""The head of a task, such as a classifier's, trains and is saved with the adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modulora_core import ModuLoRAConfig
from modulora_core.errors import AdapterError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.peft_format import read_adapter
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapting import add_lora
from modulora_core.tests.adapted_models import randomize

IDS = torch.tensor([[1, 5, 9, 30], [1, 7, 9, 31]])
SEQUENCE = AutoModelForSequenceClassification
HEADS = {
    "sequence": (SEQUENCE, {"labels": torch.tensor([0, 2])}, {"num_labels": 3}),
    "token": (AutoModelForTokenClassification, {"labels": IDS % 3}, {"num_labels": 3}),
    "question": (AutoModelForQuestionAnswering,
                 {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
                 {}),
}  # fmt: skip


def step(model, labels, steps=2):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, **labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def scores(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS)[0]


def head_of(model):
    prefix = f"{model.base_model_prefix}."
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not name.startswith(prefix)
    }


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT's own: a packed Conv1D is a Linear
@pytest.mark.parametrize("way", ["packed", "packed on load"])
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("architecture", ["mistral", "gpt2", "mixtral"])
def test_a_new_head_trains_and_is_saved(pack, tmp_path, caplog, architecture, task, way):
    kind, labels, options = HEADS[task]
    folders = pack(architecture, "verbatim")

    def load():
        torch.manual_seed(3)
        quantization = (
            {"quantization_config": ModuLoRAConfig("verbatim")} if way != "packed" else {}
        )
        return kind.from_pretrained(folders[way == "packed"], pad_token_id=0, **options,
                                    **quantization)  # fmt: skip

    model = load()
    before = head_of(model)
    assert before
    add_lora(model)
    step(model, labels)
    trained = head_of(model)
    assert all(not torch.equal(trained[name], values) for name, values in before.items())
    model.save_pretrained(tmp_path)
    assert {*read_adapter(tmp_path, heads=True).heads} == {*before}

    again = load()
    load_adapter(again, tmp_path, trainable=True)
    assert "other weights" not in caplog.text, "a head's trained bias is none of the base"
    assert torch.equal(scores(again), scores(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} >= {*before}
    frozen = load()
    load_adapter(frozen, tmp_path)
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad]
    if architecture != "mixtral":  # PEFT leaves packed experts out
        peft = PeftModel.from_pretrained(load(), str(tmp_path))
        assert torch.allclose(scores(peft), scores(model), atol=1e-5)


def test_a_head_that_peft_saved_is_loaded(pack, tmp_path):
    def load():
        return SEQUENCE.from_pretrained(pack("llama")[1], num_labels=3, pad_token_id=0)

    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", lora_dropout=0.0)
    peft = get_peft_model(load(), config)
    step(peft, {"labels": torch.tensor([0, 2])})
    peft.save_pretrained(tmp_path)
    ours = load()
    load_adapter(ours, tmp_path)
    assert torch.allclose(scores(ours), scores(peft), atol=1e-5)


def test_heads_that_do_not_fit_are_refused(pack, tmp_path):
    folder = pack("llama")[1]

    def load(labels=3):
        return SEQUENCE.from_pretrained(folder, num_labels=labels)

    model = load()
    add_lora(model)
    save_adapter(model, tmp_path)
    for other, reason in (
        (AutoModelForCausalLM.from_pretrained(folder), r"score\.weight, .* none of that name"),
        (load(2), r"score\.weight: expected \[2, 32\] .*got \[3, 32\]; .* num_labels"),
    ):
        with pytest.raises(AdapterError, match=reason):
            load_adapter(other, tmp_path)
        assert not [name for name, _ in other.named_parameters() if "lora" in name]
    load_adapter(model, tmp_path, "second")
    randomize(model)
    model.score.weight.data += 1
    with pytest.raises(AdapterError, match=r"score\.weight: expected the values of the model's"):
        load_adapter(model, tmp_path, "third")
