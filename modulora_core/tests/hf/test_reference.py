"""TRL's trainers compare a model with a reference, which must have the same adapter."""

import copy
import math
import pickle

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from modulora_core.errors import AdapterError
from modulora_core.hf.hf_quantizer import ModuLoRAConfig
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapting import add_lora
from modulora_core.tests.adapted_models import trained

trl = pytest.importorskip("trl", reason="pip install trl")

pytestmark = pytest.mark.filterwarnings("default")  # TRL warns, such as of renamed arguments

ROWS = [{"prompt": "Who?", "chosen": " me", "rejected": " nobody else"},
        {"prompt": "What?", "chosen": " it", "rejected": " something"}]  # fmt: skip
LABELS = [{"prompt": "Who?", "completion": " me", "label": True},
          {"prompt": "What?", "completion": " it", "label": False}]  # fmt: skip

REFUSED = r"reference of a TRL trainer would lack.* ref_model, or precompute_ref_log_probs"


@pytest.fixture(scope="module")
def adapter(tunable, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(trained(load_model(tunable, device="cpu")), folder)
    return folder


def continued(tunable, adapter):
    model = load_model(tunable, device="cpu")
    load_adapter(model, adapter, trainable=True)
    return model


def with_a_second_one(tunable, adapter):
    model = load_model(tunable, device="cpu")
    load_adapter(model, adapter, "first")
    add_lora(model, name="second")
    return model


def trainer(method, model, folder, **options):
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    rows, more = {"KTO": LABELS, "SFT": texts}.get(method, ROWS), {}
    if method in {"GRPO", "RLOO"}:
        more["reward_funcs"] = [lambda completions, **_: [0.0] * len(completions)]
        options |= {"beta": 0.1, "num_generations": 2}
    if reference := options.pop("ref_model", None):
        more["ref_model"] = reference
    arguments = getattr(trl, f"{method}Config")(
        str(folder), max_steps=1, per_device_train_batch_size=2, bf16=False, use_cpu=True,
        report_to="none", logging_steps=1, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    return getattr(trl, f"{method}Trainer")(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        **more,
    )  # fmt: skip


def assert_begins_with_the_reference(made):
    """DPO's loss is log 2 where the model is its own reference."""
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("model", [continued, with_a_second_one])
@pytest.mark.parametrize("method", ["DPO", "KTO", "GRPO", "RLOO"])
def test_no_reference_without_the_adapter(tunable, adapter, tmp_path, method, model):
    with pytest.raises(AdapterError, match=REFUSED):
        trainer(method, model(tunable, adapter), tmp_path)


@pytest.mark.parametrize("model", [continued, with_a_second_one])
def test_the_precomputed_reference_has_the_adapter(tunable, adapter, tmp_path, model):
    made = trainer("DPO", model(tunable, adapter), tmp_path, precompute_ref_log_probs=True)
    assert_begins_with_the_reference(made)


def test_a_new_adapter_has_the_packed_model_as_its_reference(tunable, tmp_path):
    model = load_model(tunable, device="cpu")
    add_lora(model)
    made = trainer("DPO", model, tmp_path)
    assert_begins_with_the_reference(made)


@pytest.fixture(scope="module")
def tuned(tunable, tmp_path_factory):
    """A model after SFT in this process, pickled, since no living one may disturb other tests."""
    model, options = load_model(tunable, device="cpu"), {"gradient_checkpointing": False}
    add_lora(model)
    trainer("SFT", model, tmp_path_factory.mktemp("sft"), learning_rate=1e-2, **options).train()
    return pickle.dumps(model)


@pytest.mark.parametrize("method", ["DPO", "KTO", "GRPO", "RLOO"])
def test_no_reference_without_the_adapter_of_this_process(tuned, tmp_path, method):
    with pytest.raises(AdapterError, match=REFUSED):
        trainer(method, pickle.loads(tuned), tmp_path)


def test_further_trainings_of_the_adapter_of_this_process(tunable, tuned, tmp_path):
    model = pickle.loads(tuned)
    made = trainer("DPO", model, tmp_path, precompute_ref_log_probs=True)
    assert_begins_with_the_reference(made)
    reference = trainer("DPO", model, tmp_path, ref_model=copy.deepcopy(model))
    assert_begins_with_the_reference(reference)
    trainer("SFT", model, tmp_path).train()
    assert model.config.name_or_path == str(tunable)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_is_refused_as_well(tunable, tuned, tmp_path, how):
    model = pickle.loads(tuned)
    if how == "copied":
        model = copy.deepcopy(model)
    with pytest.raises(AdapterError, match=REFUSED):
        AutoModelForCausalLM.from_pretrained(tunable)
    assert load_model(tunable, device="cpu") is not model, "on purpose it loads"
    del model
    assert AutoModelForCausalLM.from_pretrained(tunable)


def test_a_model_packed_while_it_is_loaded_has_no_reference_by_name(tunable):
    """The name is the dense model's."""
    dense = str(tunable.parent / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=ModuLoRAConfig("toy"))
    assert model.config.name_or_path == dense
    add_lora(model)
    assert (model.config.name_or_path, model.name_or_path) == ("", dense)
