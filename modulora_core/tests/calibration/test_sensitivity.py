"""The loss's sensitivity to each layer, against a whole model's backward and the loss itself."""

from __future__ import annotations

import zlib
from collections import defaultdict
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from modulora_core.calibration import (
    BlockWalk,
    CalibrationConfig,
    CalibrationText,
    find_blocks,
)
from modulora_core.calibration.sensitivity import loss_sensitivities
from modulora_core.calibration.token_weights import OutputMoments, token_weights
from modulora_core.errors import WorkError
from modulora_core.models import open_dense
from modulora_core.models.sites import find_sites
from modulora_core.tests.calibration.test_walk import Seen, error
from modulora_core.tests.products import Products
from modulora_core.tests.tiny_models import save_tiny_model, tiny_model

IDS = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.usefixtures("one_thread")


def sensitivities(folder, ids=IDS, *, spill=None):
    source = open_dense(str(folder))
    linears = find_sites(source.skeleton()).linears
    cpu = torch.device("cpu")
    return loss_sensitivities(source, ids, linears, device=cpu, folder=folder, seed=5, spill=spill)


class Gradients(Products):
    """The gradients in each product's result, by matrix: fp64 ``[rows, out]`` of each backward."""

    def __init__(self, model):
        super().__init__(model)
        self.found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def gave(self, name, expert, y, *, stacked):
        y.register_hook(partial(self._add, name, expert, stacked))

    def _add(self, name, expert, stacked, gradient):
        for i, part in enumerate(gradient if stacked else [gradient], expert):
            self.found[name, i].append(part.double().reshape(-1, part.shape[-1]))


def drawn(scores, sample):
    """The tokens drawn for a sample with seed 5: ``[seq_len, 1]``."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"5 {sample}".encode()))
    sums = scores.detach().float().exp().cumsum(-1)
    points = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
    return (sums <= points).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "architecture", ["llama-tied", "gpt2", "gemma3_text", "falcon", "mixtral", "gpt_oss"]
)
def test_outputs_and_tokens_get_the_mean_squares_of_their_gradients(architecture, tmp_path):
    folder = save_tiny_model(architecture, tmp_path)
    found = sensitivities(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    seen = Gradients(model)
    for sample, ids in enumerate(IDS):
        with seen:
            scores = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        scores.gather(-1, drawn(scores, sample)).sum().backward()
    assert {name for name, _ in seen.found if name.startswith(find_blocks(model))} == set(found)
    squares = {key: torch.cat(gradients).square() for key, gradients in seen.found.items()}
    largest = max(float(each.sum(0).max()) for each in squares.values())
    for name, matrices in found.items():
        for expert, sensitivity in enumerate(matrices):
            none = torch.zeros(0, len(sensitivity.outputs), dtype=torch.float64)
            expected = squares.get((name, expert), none)
            # fp32 against fp32 in another order of sums; a sum of rounding errors is compared with
            # the largest sum
            close = partial(torch.testing.assert_close, rtol=1e-3)
            outputs, norms = sensitivity.outputs.double(), expected.sum(1)
            close(outputs, expected.sum(0) / IDS.numel(), atol=1e-9 * largest)
            assert len(sensitivity.tokens) == len(IDS)
            if norms.sum() > 1e-9 * largest:
                tokens = torch.cat(sensitivity.tokens).double()
                close(tokens, norms / norms.mean(), atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "falcon", "mixtral"])
@pytest.mark.parametrize("sequential", [True, False])
def test_weighted_second_moments_are_those_of_autograd_in_float64(
    architecture, sequential, tmp_path
):
    """H = E[w xxᵀ] of a dense model, with w = ‖gₜ‖ / E‖g‖, and w = 1 for experts; H_O beside it."""
    folder, seen = save_tiny_model(architecture, tmp_path), Seen()
    source = open_dense(str(folder))
    linears, cpu = find_sites(source.skeleton()).linears, torch.device("cpu")
    single = [linear for linear in linears if linear.experts is None]
    inside = find_blocks(source.outline)
    names = frozenset(linear.name for linear in single if linear.name.startswith(inside))
    files = tmp_path / "weighting"
    moments = OutputMoments(files, names)
    weights = token_weights(
        IDS, files,
        lambda: loss_sensitivities(
            source, IDS, single, device=cpu, folder=files, seed=5, moments=moments
        ),
    )  # fmt: skip
    config = CalibrationConfig("ids", sequential=sequential, batch_size=2)
    text = CalibrationText(config, IDS)
    BlockWalk(source, text, linears, seen, cpu, folder, token_weights=weights).run()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    products = Gradients(model.double())
    for sample, ids in enumerate(IDS):
        with products:
            scores = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        scores.gather(-1, drawn(scores, sample)).sum().backward()
    inputs = {name: torch.cat(products.inputs[name, 0]) for name in weights}
    norms = {name: torch.cat(products.found[name, 0]).norm(dim=1) for name in weights}
    norms = {name: norm / norm.mean() for name, norm in norms.items()}
    for name in weights:
        g = torch.cat(products.found[name, 0])
        moment, root = moments.read(name), (g.norm(dim=1, keepdim=True) + 1e-300).sqrt()
        expected = (g / root).t() @ (g / root)
        assert moment is not None
        # stored in fp16 in units of the largest value
        torch.testing.assert_close(
            moment.double(), expected / expected.abs().max(), rtol=0, atol=1e-3
        )
    differing = 0
    for (name, expert), found in seen.calibrations.items():
        if (name, expert) not in products.inputs:
            continue  # no token reached this expert
        plain = products.hessian(name, expert)
        if name not in weights:
            assert error(found.hessian, plain) < 1e-5
            continue
        x = inputs[name]
        w = torch.stack([norms[other] for other in norms if torch.equal(x, inputs[other])]).mean(0)
        expected = x.t() @ (w[:, None] * x) / len(x)
        # sums of hundreds of fp32 products; gradients are within 1e-4 of fp64
        assert error(found.hessian, expected) < 1e-3, name
        assert found.samples == len(x)
        differing += error(plain.float(), expected) > 0.01
    assert differing > len(weights) / 2
    experts = {linear.name for linear in linears if linear.experts is not None}
    inside = {linear.name for linear in linears if linear.name.startswith(find_blocks(model))}
    assert weights.keys() == inside - experts


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("lm_head.weight", "model.norm.weight"):
            model.get_parameter(name).mul_(1e25)  # each is finite, their product isn't
    model.save_pretrained(tmp_path)
    with pytest.raises(WorkError, match="the model's logits: expected finite numbers"):
        sensitivities(tmp_path)
