"""Whatever needs a dense weight says so in one sentence; all else of PEFT works as on a dense one.

The refused and the working methods are all of PEFT's that train linear layers of a decoder.
"""

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from transformers import Trainer, TrainingArguments

from modulora_core import add_lora, quantize
from modulora_core.errors import AdapterError, DenseWeightError, ModelError
from modulora_core.hf.load_adapter import load_adapter
from modulora_core.hf.load_model import load_model
from modulora_core.hf.merge import merge
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import IDS, logits
from modulora_core.tests.hf.test_peft import losses
from modulora_core.tests.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of biases, norms and EVA
]

WAY_OUT = "packed by toy: expected a product.* call model.dequantize"
SOME = {"target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def load(toy, tmp_path_factory):
    """Loads a tiny Llama: its layers are packed, or its tables too, apart or tied."""
    made = {}

    def loaded(tables=False, architecture="llama"):
        if (architecture, tables) not in made:
            root = tmp_path_factory.mktemp("limits")
            dense = save_tiny_model(architecture, root / "dense")
            more = {"head": Choice("toy"), "embeddings": Choice("toy")} if tables else {}
            if architecture == "llama-tied":
                more.pop("head", None)
            quantize(str(dense), root / "packed", "toy", **more)
            made[architecture, tables] = root / "packed"
        return load_model(made[architecture, tables], device="cpu")

    return loaded


def lora(**options):
    return LoraConfig(r=4, **SOME | options)


NEED_DENSE = {
    "pissa": lora(init_lora_weights="pissa"),
    "pissa_niter_4": lora(init_lora_weights="pissa_niter_4"),
    "olora": lora(init_lora_weights="olora"),
    "corda": lora(init_lora_weights="corda", corda_config=CordaConfig()),
    "mica": lora(init_lora_weights="mica"),
    "hra": peft.HRAConfig(r=4, **SOME),
    "shira": peft.ShiraConfig(r=2, **SOME),
    "delora": peft.DeloraConfig(r=4, **SOME),
    "osf": peft.OSFConfig(**SOME),
}


@pytest.mark.parametrize("method", NEED_DENSE)
def test_methods_that_read_the_dense_weight(load, method):
    with pytest.raises(DenseWeightError, match=WAY_OUT):
        losses(get_peft_model(load(), NEED_DENSE[method]))


def test_dora_which_peft_refuses_itself(load):
    with pytest.raises(TypeError, match=r"got <class .*PackedParameter"):
        get_peft_model(load(), lora(use_dora=True))


WORK = {
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "not zero": lora(init_lora_weights=False),
    "lora_bias": lora(lora_bias=True),
    "all biases": lora(bias="all"),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, **SOME),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, **SOME),
    "lokr": peft.LoKrConfig(r=4, **SOME),
    "fourier": peft.FourierFTConfig(n_frequency=8, **SOME),
    "miss": peft.MissConfig(r=4, **SOME),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "vera": peft.VeraConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize(
    ("method", "tables"), [*((name, False) for name in WORK), ("head", True), ("embedding", True)]
)
def test_other_methods_train_as_on_the_dense_model(load, method, tables):
    found = []
    for model in (load(tables), load(tables).dequantize()):
        torch.manual_seed(1)
        found.append(losses(get_peft_model(model, copy.deepcopy(WORK[method])), steps=3))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] < found[0][0]


ONLY_PEFT = {
    "head": (lora(target_modules=["lm_head", "q_proj"]), "lm_head is not packed"),
    "embedding": (lora(target_modules=["embed_tokens", "q_proj"]), "got .*lora_embedding_A"),
    "saved norm": (lora(modules_to_save=["norm"]), "norm.weight, .* a part of the language model"),
    "saved head": (lora(modules_to_save=["lm_head"]), "lm_head.weight, .* a part of the lang"),
}


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize("name", ONLY_PEFT)
def test_an_adapter_of_more_than_packed_layers_is_refused_with_the_way_that_loads_it(
    load, name, architecture, tmp_path
):
    config, message = ONLY_PEFT[name]
    trained = get_peft_model(load(architecture=architecture), copy.deepcopy(config))
    losses(trained, steps=2)
    trained.save_pretrained(tmp_path / "adapter")
    packed = load(architecture=architecture)
    for use in (load_adapter, lambda model, path: merge(model.name_or_path, "out", adapter=path)):
        with pytest.raises(AdapterError, match=rf"{message}.*PeftModel.from_pretrained"):
            use(packed, tmp_path / "adapter")
    assert not Path("out").exists()
    expected = logits(trained.eval())
    again = peft.PeftModel.from_pretrained(packed, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again.eval()), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_packed_head_that_peft_saved_is_loaded(load, tmp_path):
    """peft saves the head's packed tensors beside it, which are no part of the adapter."""
    trained = get_peft_model(load(tables=True), copy.deepcopy(ONLY_PEFT["head"][0]))
    losses(trained, steps=2)
    trained.save_pretrained(tmp_path)
    model = load(tables=True)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(trained.eval()), rtol=1e-5, atol=1e-5)


def test_prompts_need_a_dense_embedding(load):
    """PEFT looks for a parameter with as many rows as the vocabulary, and takes its module."""
    with pytest.raises(AttributeError, match="Embedding has no attribute `codes`"):
        get_peft_model(load(tables=True), WORK["prefix"])


def layer(model):
    model.model.layers[1].requires_grad_(True)


def weight(model):
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)


def saved(*names):
    return lambda model: get_peft_model(
        model, LoraConfig(target_modules=["v_proj"], modules_to_save=[*names])
    )


UNFREEZE = {
    "model": lambda model: model.requires_grad_(True),
    "layer": layer,
    "weight": weight,
    "embedding": lambda model: model.get_input_embeddings().requires_grad_(True),
    "head": lambda model: model.get_output_embeddings().weight.requires_grad_(True),
    "saved layer": saved("q_proj"),
    "saved embedding": saved("embed_tokens"),
    "saved head": saved("lm_head"),
}


def copied(model):
    return copy.deepcopy(model)


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def cast(model):
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("how", [copied, unpickled, cast])
@pytest.mark.parametrize("way", UNFREEZE)
def test_packed_weights_are_not_unfrozen(load, way, how):
    model = how(load(tables=True))
    with pytest.raises(ModelError, match=r"requires_grad_.* can't train; train an adapter with"):
        UNFREEZE[way](model)
    model.requires_grad_(False)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_tied_packed_head_is_not_saved_beside_an_adapter(load):
    """It has no parameters of its own, so nothing of it would train."""
    with pytest.raises(ModelError, match=r"modules_to_save: expected dense weights, got a packed"):
        saved("lm_head")(load(tables=True, architecture="llama-tied"))


def test_dense_parts_are_unfrozen(load):
    model = load()
    model.model.layers[0].input_layernorm.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    found = losses(model)
    assert found[-1] < found[0]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_packed_tables_keep_their_size(load, architecture):
    model = load(True, architecture)
    before, rows = logits(model), model.config.vocab_size
    for same in ((), (None,), (rows,)):
        assert model.resize_token_embeddings(*same) is model.get_input_embeddings()
    for other in ({"new_num_tokens": rows + 4}, {"new_num_tokens": 8}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ModelError, match=r"resize_token_embeddings.*, then quantize it"):
            model.resize_token_embeddings(**other)
    assert torch.equal(logits(model), before)
    with pytest.raises(DenseWeightError, match=WAY_OUT):
        losses(get_peft_model(model, lora(trainable_token_indices=[1, 2])))
    dense = load(False, architecture)
    assert len(dense.resize_token_embeddings(rows + 4).weight) == rows + 4
    assert dense(IDS).logits.shape[-1] == rows + 4


@pytest.mark.parametrize("how", [lambda model: model, copied, unpickled])
def test_the_trainer_refuses_a_model_in_which_nothing_trains(load, how, tmp_path):
    def trainer(model):
        return Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))

    model = how(load())
    with pytest.raises(ValueError, match="attach trainable adapters on top of the quantized model"):
        trainer(model)
    model.model.norm.requires_grad_(True)
    assert trainer(model)
    adapted = load()
    add_lora(adapted)
    assert trainer(how(adapted))
