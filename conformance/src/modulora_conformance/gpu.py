"""Measurements of ``modulora check-gpu``: kernels, bandwidth, a training step, decoding."""

from __future__ import annotations

import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from modulora_kernels.parity import Comparison, compare
from transformers import AutoModelForCausalLM, LlamaConfig

from modulora_conformance.packed_noise import accepted, packed_noise
from modulora_core.checkpoints.peak_memory import PeakMemory
from modulora_core.cli.text import format_size
from modulora_core.hf.hf_quantizer import ModuLoRAConfig
from modulora_core.lora.adapting import add_lora
from modulora_core.progress import quiet
from modulora_core.registry import Entry, create
from modulora_core.spec import QuantizerSpec
from modulora_core.training.chunked_loss import chunked_loss
from modulora_core.training.gradient_checkpointing import checkpoint_activations

if TYPE_CHECKING:
    from modulora_conformance.predicted import Card

SHAPES = ((3, 5), (37, 52), (130, 300))
"""Out and in features, before they are made to fit the quantizer: no multiples of a block."""

ROWS = (1, 3, 17, 70)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGE = {"cuda": (4096, 4096), "cpu": (512, 512)}
MANY = {"cuda": 2048, "cpu": 64}
TOKENS, NEW_TOKENS = {"cuda": (2, 512), "cpu": (2, 16)}, 16


def comparisons(entry: Entry[QuantizerSpec], device: torch.device) -> Iterator[Comparison]:
    """Every result of a plugin's kernels beside plain torch's: its promised options, each shape,
    each dtype."""
    assert entry.spec is not None
    for options in {str(p.options): p.options for p in entry.spec.promises}.values() or [{}]:
        quantizer = create(entry.name, dict(options))
        for shape in dict.fromkeys(accepted(quantizer, shape) for shape in SHAPES):
            packed = packed_noise(quantizer, shape).to(device)
            for dtype in DTYPES:
                yield from compare(quantizer, packed, dtype, ROWS)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """The time of one call, of ``repeats`` in a row after one that is not counted."""
    work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device) -> str:
    """How fast the device copies."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**22, dtype=torch.uint8).to(device)
    target = torch.empty_like(source)
    taken = seconds(lambda: target.copy_(source), device)
    return f"copies {2 * source.nbytes / taken / 1e9:.1f} GB/s"


def card_of(device: torch.device) -> Card | None:
    """The public figures of the GPU, where they are known; the prediction needs triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from modulora_conformance.predicted import card_named

    return card_named(torch.cuda.get_device_name(device))


def products(name: str, device: torch.device, card: Card | None = None) -> Iterator[str]:
    """How fast a row is multiplied, as decoding does, and many rows, beside the dense weight.

    Args:
        card: its arithmetic gives the least time of each product.
    """
    quantizer, kind = create(name), device.type
    shape = accepted(quantizer, LARGE[kind])
    cases = [(1, False), (MANY[kind], False), (MANY[kind], True)]
    packed = packed_noise(quantizer, shape).to(device)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    dense = torch.randn(shape).to(device, dtype)
    least: list[float] = []
    if card is not None:
        try:
            least = _least_seconds(name, shape, cases, card)
        except Exception as failure:  # of a compiler; the measurements do not need it
            yield f"no prediction: {failure}"[:300]
    for number, (rows, transpose) in enumerate(cases):
        x = torch.randn(rows, shape[1 - transpose]).to(device, dtype)
        weight = dense if transpose else dense.t()
        taken = seconds(partial(quantizer.matmul, x, packed, transpose), device)
        ratio = taken / seconds(partial(torch.matmul, x, weight), device)
        title = f"{rows} rows" if rows > 1 else "a row"
        found = f"{title}{', transposed,' * transpose} in {1e6 * taken:.0f} µs"
        if least:
            found += f" (by arithmetic at least {1e6 * least[number]:.0f} µs)"
        yield f"{found}, {packed.nbytes / taken / 1e9:.1f} GB/s, {ratio:.2f} × dense"


def _least_seconds(
    name: str, shape: tuple[int, int], cases: list[tuple[int, bool]], card: Card
) -> list[float]:
    from modulora_conformance.predicted import product_seconds

    # in another process: kernels' tables are then on a fake device
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(product_seconds, name, shape, cases, card).result()


def training_and_decoding(name: str, device: torch.device) -> str:
    """A LoRA step and greedy decoding of a small Llama with random weights.

    Raises:
        RuntimeError: the loss is not finite, or an adapter got no gradient.
    """
    large = device.type == "cuda"
    config = LlamaConfig(
        hidden_size=2048 if large else 128, intermediate_size=5632 if large else 256,
        num_hidden_layers=8 if large else 2, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000 if large else 1024,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if large else torch.float32
    with quiet(), tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=ModuLoRAConfig(quantizer=name), dtype=dtype,
            device_map={"": str(device)},
        )  # fmt: skip
    add_lora(model)
    checkpoint_activations(model)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(config.vocab_size, TOKENS[device.type]).to(device)
    losses = []

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with chunked_loss(model):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    step()
    with PeakMemory(device) as peak:
        taken = seconds(step, device, repeats=2)
    without = sum(each.grad is None for each in trained)
    if without or not torch.tensor(losses).isfinite().all():
        raise RuntimeError(f"losses {losses}, {without} parameters without a gradient")
    model.eval()
    decoding = seconds(
        lambda: model.generate(ids[:1, :16], max_new_tokens=NEW_TOKENS, do_sample=False),
        device, repeats=1,
    )  # fmt: skip
    return (
        f"step of {ids.numel()} tokens {1e3 * taken:.0f} ms, peak {format_size(peak.nbytes)}, "
        f"{NEW_TOKENS / decoding:.0f} tokens/s"
    )
