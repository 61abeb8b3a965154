"""One step of training on a quantized model beside the same step on the dense one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from modulora_conformance import oracle
from modulora_conformance.cases import generator
from modulora_conformance.measurements import Measurements
from modulora_conformance.tiny_model import IDS, TinyModel, adapted_loss, dense_twin, logits_of
from modulora_core.adapters.lora import (
    LoRASettings,
    adapter_layers,
    add_lora,
    load_adapter,
    save_adapter,
)
from modulora_core.checkpoints.checkpoint import load_model

SETTINGS = LoRASettings(rank=2, alpha=4.0, dropout=0.0)
LEARNING_RATE = 0.1


def check_training_step(
    saved: TinyModel, folder: Path, measurements: Measurements, tolerance: float
) -> None:
    """Compare gradients, then logits after the step, then those of the adapter on a model that was loaded anew.

    Args:
        folder: where the adapter is saved; tolerance: of logits; gradients go through the model twice and have ten times that.
    """
    model = load_model(saved.packed, device="cpu")
    dense = dense_twin(model, saved.dense)
    add_lora(model, SETTINGS)
    layers = dict(adapter_layers(model))
    adapters = {path: _randomise(layer.lora_A["default"], layer.lora_B["default"], i)
                for i, (path, layer) in enumerate(layers.items())}  # fmt: skip
    leaves = [leaf for pair in adapters.values() for leaf in pair]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scale = SETTINGS.alpha / SETTINGS.rank

    loss, _ = adapted_loss(dense, adapters, scale)
    expected = torch.autograd.grad(loss, leaves)
    model.train()(IDS, labels=IDS).loss.backward()
    names = [f"{path} {which}" for path in layers for which in "AB"]
    own = [
        layer.parameters_of("default")[which]
        for layer in layers.values()
        for which in ("lora_A", "lora_B")
    ]
    for name, parameter, gradient in zip(names, own, expected, strict=True):
        assert parameter.grad is not None, f"{name}: expected a gradient, got none"
        error = oracle.relative_error(parameter.grad, gradient)
        measurements.at_most("gradients of adapters", error, 10 * tolerance, case=name)

    torch.optim.SGD(trained, lr=LEARNING_RATE).step()
    with torch.no_grad():
        for leaf, gradient in zip(leaves, expected, strict=True):
            leaf -= LEARNING_RATE * gradient
        _, exact = adapted_loss(dense, adapters, scale)
    logits = logits_of(model)
    measurements.at_most(
        "logits after a step", oracle.relative_error(logits, exact), 10 * tolerance
    )
    _check_reloaded(model, saved, folder, logits)


def _randomise(A: nn.Parameter, B: nn.Parameter, seed: int) -> tuple[Tensor, Tensor]:
    """Give B values, without which A would get no gradient. Returns copies of both, to be trained beside."""
    with torch.no_grad():
        B.copy_(0.1 * torch.randn(B.shape, generator=generator(seed)))
    return A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()


def _check_reloaded(model: nn.Module, saved: TinyModel, folder: Path, logits: Tensor) -> None:
    save_adapter(model, folder, settings=SETTINGS)
    again = load_model(saved.packed, device="cpu")
    load_adapter(again, folder)
    assert torch.equal(logits_of(again), logits), (
        "expected the same logits bit for bit from the saved adapter on the model loaded anew, got others"
    )
