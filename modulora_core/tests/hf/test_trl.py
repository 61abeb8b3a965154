"""TRL's trainers on a packed model, its head packed too, beside the same model made dense."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from modulora_conformance.allocations import Allocations
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from modulora_core import LoRASettings, add_lora, load_model, quantize
from modulora_core.errors import DenseWeightError
from modulora_core.registry import Choice
from modulora_core.tests.adapted_models import save_llama_with_tokenizer
from modulora_core.tests.tiny_tokenizer import make_tokenizer

trl = pytest.importorskip("trl", reason="pip install trl")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # TRL warns, such as of renamed arguments
]

TEXTS = ("Who", " me"), ("What then", " it was that"), ("When", " now"), ("How so", " well enough")
PAIRS = [{"prompt": p, "chosen": a, "rejected": " nobody else"} for p, a in TEXTS]
ROWS = {
    "SFT": [{"prompt": p, "completion": a} for p, a in TEXTS],
    "KTO": [{"prompt": p, "completion": a, "label": len(p) > 4} for p, a in TEXTS],
    "GRPO": [{"prompt": p} for p, _ in TEXTS],
    "RLOO": [{"prompt": p} for p, _ in TEXTS],
}
GROUPS = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1}
TRAINERS = {
    "SFT nll": ("SFT", {}),
    "SFT chunked_nll": ("SFT", {"loss_type": "chunked_nll"}),
    "SFT dft": ("SFT", {"loss_type": "dft"}),
    "DPO": ("DPO", {}),
    "KTO": ("KTO", {}),
    "ORPO": ("ORPO", {}),
    "GRPO": ("GRPO", GROUPS),
    "RLOO": ("RLOO", GROUPS),
    "Reward": ("Reward", {}),
}
HEADS = ("untied", "tied")
ADAPTERS = ("peft", "add_lora")


@pytest.fixture(scope="module")
def folders(toy, tmp_path_factory):
    """Tiny Llamas whose layers, embedding and output head are packed."""
    made = {}
    for head in HEADS:
        root, made[head] = tmp_path_factory.mktemp(head), Path()
        save_llama_with_tokenizer(root / "dense", tie_word_embeddings=head == "tied")
        own = {} if head == "tied" else {"head": Choice("toy")}
        quantize(str(root / "dense"), root / "packed", "toy", embeddings=Choice("toy"), **own)
        made[head] = root / "packed"
    return made


def plain(name):
    """The name of a parameter with our layers, which PEFT nests."""
    name = name.removeprefix("base_model.model.").removesuffix(".weight")
    return name.replace(".modules_to_save.default", "")


class Gradients(TrainerCallback):
    """Keeps the gradients of each step, by the names of our layers."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        trained = {plain(name): p.grad for name, p in model.named_parameters()}
        self.steps.append({n: g.float().clone() for n, g in trained.items() if g is not None})


def loaded(folder, method, adapter, *, dense, dtype):
    torch.manual_seed(0)
    if method == "Reward":
        kind = AutoModelForSequenceClassification
        model = kind.from_pretrained(folder, dtype=getattr(torch, dtype), num_labels=1)
    else:
        model = load_model(folder, dtype=dtype, device="cpu")
    if adapter == "add_lora":
        add_lora(model, LoRASettings(rank=4, alpha=8, dropout=0.0))
        return model
    model = model.dequantize() if dense else model
    task = "SEQ_CLS" if method == "Reward" else "CAUSAL_LM"
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task)
    model = get_peft_model(model, config)
    ours = dict(loaded(folder, method, "add_lora", dense=False, dtype=dtype).named_parameters())
    for name, parameter in model.named_parameters():  # both adapters begin with one A
        if "lora_A" in name:
            parameter.data.copy_(ours[plain(name)])
    return model


DENSE = {}
"""The runs of the dense model, with PEFT's adapter: ours trains alike."""


def trained(folder, trainer, adapter, out, *, dense=False, dtype="float32", within=None, **options):
    """The losses of two steps, and their gradients."""
    method, own = TRAINERS[trainer]
    source = trl
    if method == "ORPO":
        import trl.experimental.orpo as source
    model = loaded(folder, method, adapter, dense=dense, dtype=dtype)
    more = {}
    if method in ("GRPO", "RLOO"):
        more["reward_funcs"] = lambda completions, **_: [float(len(c) % 5) for c in completions]
    gradients, tokenizer = Gradients(), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    arguments = getattr(source, f"{method}Config")(
        str(out), max_steps=2, per_device_train_batch_size=2, bf16=False, use_cpu=True,
        report_to="none", logging_steps=1, optim="sgd", learning_rate=0.5, save_strategy="no",
        lr_scheduler_type="constant", disable_tqdm=True, **own, **options,
    )  # fmt: skip
    made = getattr(source, f"{method}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_list(ROWS.get(method, PAIRS)),
        processing_class=tokenizer, callbacks=[gradients], **more,
    )  # fmt: skip
    with within or nullcontext():
        made.train()
    return [e["loss"] for e in made.state.log_history if "loss" in e], gradients.steps


@pytest.mark.parametrize("usual", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_losses_and_gradients_are_the_dense_model_s(
    folders, tmp_path, trainer, head, adapter, usual
):
    """Usually with gradient checkpointing, TRL's default, on the untied head alone."""
    folder, checkpointing = folders[head], (head == "untied") == usual
    options = {"gradient_checkpointing": checkpointing}
    losses, steps = trained(folder, trainer, adapter, tmp_path, **options)
    key = folder, trainer, checkpointing
    if key not in DENSE:
        DENSE[key] = trained(folder, trainer, "peft", tmp_path, dense=True, **options)
    expected, expected_steps = DENSE[key]
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(steps) == 2
    for found, wanted in zip(steps, expected_steps, strict=True):
        assert found.keys() == wanted.keys()
        size = max(float(gradient.abs().max()) for gradient in wanted.values())
        assert size > 0
        for name, gradient in found.items():
            assert float((gradient - wanted[name]).abs().max()) < 1e-5 * size, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trainer", ["SFT nll", "DPO"])
def test_bfloat16_is_no_farther_from_float32_than_the_dense_model(folders, tmp_path, trainer, head):
    truth, packed, dense = (
        trained(folders[head], trainer, "peft", tmp_path, dense=is_dense, dtype=dtype)[1]
        for is_dense, dtype in ((True, "float32"), (False, "bfloat16"), (True, "bfloat16"))
    )

    def distance(steps):
        parts = ((steps[0][name] - truth[0][name]).square().sum() for name in truth[0])
        return float(sum(parts)) ** 0.5

    assert distance(packed) <= 1.5 * distance(dense)


@pytest.mark.parametrize(("trainer", "head"), [("SFT nll", "untied"), ("DPO", "tied")])
def test_no_dense_head_exists_at_a_vocabulary_of_128000(toy, tmp_path, trainer, head):
    rows, width = 128_000, 64
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=head == "tied",
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    own = {} if head == "tied" else {"head": Choice("toy")}
    quantize(
        str(tmp_path / "dense"), tmp_path / "packed", "toy", embeddings=Choice("toy"), **own
    )  # fmt: skip
    packed, dense = Allocations(), Allocations()
    for followed in (packed, dense):
        is_dense, out = followed is dense, tmp_path / "out"
        trained(tmp_path / "packed", trainer, "peft", out, dense=is_dense, within=followed)
    head_bytes = rows * width * 4  # TRL reads a quarter of the rows at a time
    assert head_bytes / 8 < packed.largest < head_bytes / 2
    assert packed.peak < dense.peak + head_bytes / 2, "the dense head was there before"


def test_an_adapted_head_is_refused_and_not_left_out(folders, tmp_path, monkeypatch):
    """TRL multiplies by the weight alone."""

    def adapted(*arguments, **options):
        model = load_model(folders["untied"], device="cpu")
        add_lora(model, LoRASettings(targets=("lm_head", "q_proj")))
        return model

    monkeypatch.setattr(f"{__name__}.loaded", adapted)
    with pytest.raises(DenseWeightError, match=r"rows of a 600x32 weight .* without an adapter"):
        trained(folders["untied"], "SFT nll", "add_lora", tmp_path)


READS = {
    "slice": lambda W: W[3:77],
    "open slice": lambda W: W[590:],
    "empty": lambda W: W[5:5],
    "past the end": lambda W: W[595:700],
    "steps": lambda W: W[1:90:7],
    "row": lambda W: W[5],
    "last": lambda W: W[-1],
    "ids": lambda W: W[torch.tensor([[4, 4], [599, 0]])],
    "list": lambda W: W[[3, 1]],
    "mask": lambda W: W[torch.arange(600) % 50 == 0],
    "shape": lambda W: W.shape,
    "dtype": lambda W: W.dtype,
    "device": lambda W: W.device,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_rows_are_the_dense_model_s(folders, head, dtype, read):
    model = load_model(folders[head], dtype=dtype, device="cpu")
    weights = [model.get_output_embeddings().weight, model.get_input_embeddings().weight]
    found = [READS[read](weight) for weight in weights]
    dense = model.dequantize()
    for value, layer in zip(
        found, (dense.get_output_embeddings(), dense.get_input_embeddings()), strict=True
    ):
        expected = READS[read](layer.weight)
        if isinstance(expected, Tensor):
            assert (value.dtype, value.requires_grad) == (expected.dtype, False)
            assert type(value) is Tensor
            assert torch.equal(value, expected.detach())
        else:
            assert value == expected


def test_a_row_outside_is_an_index_error(folders):
    model = load_model(folders["untied"], device="cpu")
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        for index in (600, torch.tensor([1, 600]), (slice(0, 4), 0)):
            with pytest.raises(IndexError):
                weight[index]


def test_rows_take_part_in_autograd_as_constants(folders):
    model = load_model(folders["untied"], dtype="float32", device="cpu")
    hidden = torch.randn(3, 32, requires_grad=True)
    (hidden @ model.lm_head.weight[10:20].T).square().sum().backward()
    W = model.dequantize().lm_head.weight[10:20].detach()
    torch.testing.assert_close(hidden.grad, 2 * hidden.detach() @ W.T @ W)


REFUSED = {
    "data": lambda W: W.data,
    "data_ptr": lambda W: W.data_ptr(),
    "untyped_storage": lambda W: W.untyped_storage(),
    "mul_": lambda W: W.mul_(2),
    "__setitem__": lambda W: W.__setitem__(0, 1.0),
    "add": lambda W: torch.add(W, 1),
    "t": lambda W: W.t(),
    "to": lambda W: W.to(torch.bfloat16),
    "index_copy": lambda W: W.index_copy(0, torch.tensor([1]), torch.ones(1, 32)),
    "tolist": lambda W: W.tolist(),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("head", HEADS)
def test_another_use_says_what_was_tried_on_which_weight(folders, head, name):
    model = load_model(folders[head], device="cpu")
    inner = model.model.layers[1].mlp.up_proj.weight
    shapes = {"600x32": model.lm_head.weight, "64x32": inner}
    for shape, weight in (*shapes.items(), ("600x32", model.model.embed_tokens.weight)):
        with pytest.raises(
            (DenseWeightError, TypeError), match=rf"^{name}.* of a {shape} weight packed by toy: "
        ):
            REFUSED[name](weight)


def test_a_weight_in_its_own_dtype_is_itself(folders):
    """GRPO's ``cast_lm_head_to_fp32`` casts the head, and then its weight at each forward."""
    model = load_model(folders["untied"], dtype="bfloat16", device="cpu")
    x = torch.randn(2, 32)
    weight = model.lm_head.float().weight.to(torch.float32)
    expected = x @ model.dequantize().lm_head.weight.float().T
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), expected, rtol=1e-2, atol=0.1)
