"""vLLM serves packed folders: its log-probabilities are transformers', in fp32."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from modulora_convert.convert import convert
from modulora_vllm.export import export_for_vllm
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm_processes import PROMPTS, largest_difference, log_probabilities, need_vllm, run_vllm

from modulora_core import load_model
from modulora_core.calibration import CalibrationConfig
from modulora_core.hf.save_adapter import save_adapter
from modulora_core.lora.adapted import adapter_layers
from modulora_core.lora.settings import LoRASettings
from modulora_core.quantization.assignment import Assignment
from modulora_core.quantization.quantize import quantize
from modulora_core.tests.adapted_models import randomize, trained
from modulora_core.tests.tiny_tokenizer import make_tokenizer

need_vllm()
pytestmark = pytest.mark.slow  # each process of vLLM takes half a minute

TOLERANCE = 1e-4
"""Of log-probabilities: vLLM's attention and norms round otherwise than torch's."""

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 600, "head_dim": 32,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip


def save_model(folder, model_type="llama", **sizes):
    """Save a tiny model with random norms and biases too, and a tokenizer."""
    config = CONFIG_MAPPING[model_type](**{**SIZES, **sizes})
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator)
                is_norm = tensor.dim() == 1 and "norm" in name
                tensor.copy_(1 + values / 8 if is_norm else values / 16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def packed_model(root, quantizer, model_type="llama", **sizes):
    needs_text = any(name in str(quantizer) for name in ("optq", "quip", "qtip"))
    text = CalibrationConfig("pydoc[:5%]", samples=4, seq_len=48) if needs_text else None
    root.mkdir(exist_ok=True)
    dense = save_model(root / "dense", model_type, **sizes)
    if not isinstance(quantizer, Assignment):
        quantizer = Assignment(default=quantizer)
    quantize(str(dense), root / "packed", quantizer, calibration=text, progress=False)
    return root / "packed"


QUANTIZERS = (
    "nf4", "nf4:double_quant=true", "int8", "optq:bits=3", "quip-sharp-e8", "qtip", "fp4",
    "gguf:type=Q4_K", "gguf:type=Q8_0", "half-quadratic:bits=3", "toy",
)  # fmt: skip
"""The last two are of strangers: the package of an example, and one that only tests have."""


def test_each_quantizer_gives_transformers_log_probabilities(tmp_path, toy, toy_root):
    folders = {name: packed_model(tmp_path / name, name) for name in QUANTIZERS}
    qtip = packed_model(tmp_path / "layout", "qtip:bits=4,layout=exl3")
    convert(str(qtip), tmp_path / "exl3", "exl3")
    check_answers(tmp_path, {**folders, "a folder of EXL3": tmp_path / "exl3"}, toy_root)


def check_answers(tmp_path, folders, site=None):
    """Compare vLLM's answers with transformers', for several models."""
    answers = run_vllm(tmp_path, *({"model": each} for each in folders.values()), site=site)
    found = {
        name: largest_difference(answer, load_model(folder, device="cpu"))
        for (name, folder), answer in zip(folders.items(), answers, strict=True)
    }
    print(found)
    assert {name: error for name, error in found.items() if error >= TOLERANCE} == {}


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 128}  # fmt: skip

MIXED = Assignment(
    default="nf4",
    layers={"*.q_proj": "int8", "*.k_proj": None, "*.layers.1.*.gate_proj": None,
            "*.layers.1.*.down_proj": "qtip", "*.layers.0.*.o_proj": "gguf"},
    head="int8", embeddings="nf4",
)  # fmt: skip
"""Quantizers differ within a layer of vLLM, and some of its parts are dense."""


ARCHITECTURES = {
    "mixed": ("llama", MIXED, {"attention_bias": True, "tie_word_embeddings": False}),
    "packed tied table": (
        "llama", Assignment(default="nf4", embeddings="int8"), {"tie_word_embeddings": True}
    ),
    "qwen2": ("qwen2", "int8", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", MIXED, {"tie_word_embeddings": False}),
    "gemma3": (
        "gemma3_text", Assignment(default="nf4", embeddings="int8"),
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("phi3", "nf4", {}),
    "gpt2": ("gpt2", "int8", {"n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 64}),
    "mixtral": ("mixtral", "nf4", EXPERTS),
    "qwen3_moe": ("qwen3_moe", "int8", {**EXPERTS, "tie_word_embeddings": False}),
}  # fmt: skip


def test_each_architecture_gives_transformers_log_probabilities(tmp_path):
    check_answers(
        tmp_path,
        {
            name: packed_model(tmp_path / name, quantizer, model_type, **sizes)
            for name, (model_type, quantizer, sizes) in ARCHITECTURES.items()
        },
    )


def test_adapters_of_one_batch_give_transformers_log_probabilities(tmp_path):
    packed = packed_model(tmp_path, "qtip")
    models, paths = adapted_models(tmp_path, packed)
    names = ["one", None, "two", "one", None, "two"]
    (answers,) = run_vllm(tmp_path, {"model": packed, "adapters": names, "paths": paths})
    for name, ids, answer in zip(names, PROMPTS, answers, strict=True):
        assert largest_difference([answer], models[name], [ids]) < TOLERANCE
    shared = log_probabilities(models["one"], [*PROMPTS[1], *answers[1]["ids"]])
    assert not torch.allclose(shared, torch.tensor(answers[1]["logprobs"]), atol=1e-2)


def test_adapters_of_packed_experts_give_transformers_log_probabilities(tmp_path):
    """Stored one by one, as in Mixtral and Qwen 3; a request without an adapter is in the batch."""
    names = ["one", None, "two", "one", None, "two"]
    requests, models = [], []
    for architecture in ("mixtral", "qwen3_moe"):
        model_type, quantizer, sizes = ARCHITECTURES[architecture]
        packed = packed_model(tmp_path / architecture, quantizer, model_type, **sizes)
        adapted, paths = adapted_models(tmp_path / architecture, packed)
        assert any("experts" in path for path, _ in adapter_layers(adapted["one"]))
        requests.append({"model": packed, "adapters": names, "paths": paths})
        models.append(adapted)
    sharded = {"options": {"enable_lora": True, "fully_sharded_loras": True}}
    *served, refused = run_vllm(tmp_path, *requests, {"model": packed, **sharded})
    assert "packed experts are served without fully sharded adapters; serve what" in refused
    found = []
    for adapted, answers in zip(models, served, strict=True):
        assert not isinstance(answers, str), answers
        for name, ids, answer in zip(names, PROMPTS, answers, strict=True):
            found.append(largest_difference([answer], adapted[name], [ids]))
        assert largest_difference(answers[:1], adapted[None], PROMPTS[:1]) > 1e-2
    print(found)
    assert max(found) < TOLERANCE


def adapted_models(root, packed):
    """The packed model without and with two adapters, and their folders for vLLM, by name."""
    models = {None: load_model(packed, device="cpu")}
    paths = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        models[name] = trained(load_model(packed, device="cpu"), LoRASettings(rank=4, alpha=7.0))
        randomize(models[name], seed)
        save_adapter(models[name], root / name)
        export_for_vllm(str(root / name), root / f"{name}-vllm", model=str(packed))
        paths[name] = str(root / f"{name}-vllm")
    return models, paths


def test_three_processes_give_the_same_answers(tmp_path, capsys):
    """Some weights are cut, others refuse a cut and stay whole, and the vocabulary is padded."""
    uncut = "half-quadratic"  # has no `sliced`
    quantizer = Assignment(
        default="nf4", embeddings="int8",
        layers={"*.gate_proj": "nf4:double_quant=true", "*.v_proj": None,
                "*.layers.1.*.up_proj": uncut, "*.layers.1.*.o_proj": uncut},
    )  # fmt: skip
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 576}
    packed = packed_model(
        tmp_path, quantizer, hidden_size=288, vocab_size=720, tie_word_embeddings=True, **sizes
    )
    options = {"tensor_parallel_size": 3, "distributed_executor_backend": "mp"}
    (answers,) = run_vllm(tmp_path, {"model": packed, "options": options}, processes=True)
    assert f"{uncut} can't cut its weights of [576, 288]" in capsys.readouterr().out
    assert largest_difference(answers, load_model(packed, device="cpu")) < TOLERANCE


def without(*names):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        for name in names:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def unknown_quantizer(folder):
    text = (folder / "config.json").read_text().replace('"quantizer": "nf4"', '"quantizer": "gone"')
    (folder / "config.json").write_text(text)


DAMAGES = {
    "packed": (
        without("model.layers.1.mlp.up_proj.weight.codes"),
        "up_proj.weight.codes: expected uint8",
    ),
    "dense": (without("model.norm.weight"), "model.norm.weight: expected floats [256]"),
    "quantizer": (unknown_quantizer, "quantizer 'gone' isn't installed"),
}


def test_a_damaged_folder_is_refused(tmp_path):
    packed = packed_model(tmp_path, "nf4")
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(packed, tmp_path / f"no {name}")
        damage(tmp_path / f"no {name}")
    answers = run_vllm(tmp_path, *({"model": tmp_path / f"no {name}"} for name in DAMAGES))
    for (_, message), answer in zip(DAMAGES.values(), answers, strict=True):
        assert message in answer


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_the_command_answers_and_leaves_no_process(tmp_path, engine):
    packed = packed_model(tmp_path, "nf4")
    torch.manual_seed(0)
    models = {str(packed): load_model(packed, device="cpu")}
    words = ["serve", str(packed), "--engine", engine, "--dtype", "float32"]
    if engine == "vllm":
        models["mine"] = trained(load_model(packed, device="cpu"), LoRASettings(rank=4))
        save_adapter(models["mine"], tmp_path / "mine")
        words += ["--adapter", f"mine={tmp_path / 'mine'}"]
    tokenizer = AutoTokenizer.from_pretrained(packed)
    ids = tokenizer("the first", return_tensors="pt").input_ids
    end = signal.SIGINT if engine == "vllm" else signal.SIGTERM
    with serving(tmp_path, words, end) as address:
        for name, model in models.items():
            text = completion(address, name, "the first", 5)
            new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
            expected = tokenizer.decode(new, skip_special_tokens=True)
            assert text.rstrip(CUT) == expected.rstrip(CUT), name


CUT = "\ufffd"
"""The sign for a character whose bytes aren't complete; vLLM leaves it out at the end."""


@contextmanager
def serving(folder, words, end):
    """The address of ``modulora serve``, which a signal ends within ten seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modulora_core.cli", *words, "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log,
            # a shell's background job, such as these tests may be, ignores Ctrl-C
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        while "Ctrl-C ends it" not in (folder / "log").read_text():
            time.sleep(0.5)
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
        (group,) = children(process.pid)
        yield f"http://localhost:{port}"
        assert (folder / "log").read_text().count("curl http") == 1
    finally:
        process.send_signal(end)
        assert process.wait(10) == 0
    left = [path for path in Path("/proc").glob("[0-9]*") if session_of(path) == group]
    assert not left


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


def session_of(process):
    """The session of a process, which `modulora serve` makes for its server; None if it ended."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def completion(address, name, prompt, tokens):
    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return json.loads(post(f"{address}/v1/completions", body))["choices"][0]["text"]


def post(address, body):
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_a_trainer_and_its_server_give_one_completion_the_same_log_probabilities(tmp_path):
    """As in reinforcement learning: the server loads PEFT's adapter while it runs, in 2 bits."""
    packed = packed_model(tmp_path, "qtip")
    torch.manual_seed(0)
    trainer = get_peft_model(
        load_model(packed, device="cpu"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    words = ["serve", str(packed), "--engine", "vllm", "--dtype", "float32", "--allow-loading"]
    words += ["--engine-options", "--max-loras 3 --max-lora-rank 8"]
    found = []
    with serving(tmp_path, words, signal.SIGTERM) as address:
        for step in ("one", "two"):
            with torch.no_grad():
                for name, tensor in trainer.named_parameters():
                    if "lora_B" in name:
                        tensor.normal_(std=0.3)
            trainer.save_pretrained(tmp_path / step)
            path = {"lora_name": step, "lora_path": str(tmp_path / step)}
            post(f"{address}/v1/load_lora_adapter", path)
            body = {"model": step, "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 1,
                    "seed": 3, "logprobs": 0, "return_token_ids": True,
                    "ignore_eos": True}  # fmt: skip
            answer = json.loads(post(f"{address}/v1/completions", body))["choices"][0]
            ids = [*PROMPTS[0], *answer["token_ids"]]
            expected = log_probabilities(trainer, ids)[len(PROMPTS[0]) - 1 :]
            served = torch.tensor(answer["logprobs"]["token_logprobs"])
            assert len(served) == 8
            print("difference:", float((served - expected).abs().max()))
            torch.testing.assert_close(served, expected, rtol=0, atol=TOLERANCE)
            found.append(expected.tolist())
    assert found[0] != found[1]
