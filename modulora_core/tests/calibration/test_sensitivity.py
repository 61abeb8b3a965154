"""How the loss minds errors of layers, block by block, against the backward of a whole model in memory, and against what the loss does."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from modulora_core.calibration import find_blocks
from modulora_core.calibration import sensitivity as module
from modulora_core.calibration.sensitivity import Sensitivity, boundary_bytes, loss_sensitivities
from modulora_core.errors import WorkError
from modulora_core.models import open_model
from modulora_core.models.sites import find_sites
from modulora_core.tests.products import Products
from modulora_core.tests.tiny_models import ARCHITECTURES, save_tiny_model, tiny_model

IDS = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(1))
KINDS = ("llama", "llama-tied", "gpt2", "opt", "gemma3_text", "falcon", "mixtral", "gpt_oss", "llama4_text", "deepseek_v3")  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def sensitivities(
    folder: Path, ids: Tensor = IDS, *, spill: bool | None = None
) -> dict[str, list[Sensitivity]]:
    source = open_model(str(folder))
    linears = find_sites(source.skeleton()).linears
    return loss_sensitivities(
        source, ids, linears, device=torch.device("cpu"), folder=folder, seed=5, spill=spill
    )  # fmt: skip


class Gradients(Products):
    """The gradients in each product's result, by matrix: fp64 ``[rows, out]`` of each backward."""

    def __init__(self, model: object) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.found: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def gave(self, name: str, expert: int, y: Tensor, *, stacked: bool) -> None:
        y.register_hook(partial(self._add, name, expert, stacked))

    def _add(self, name: str, expert: int, stacked: bool, gradient: Tensor) -> None:
        for i, part in enumerate(gradient if stacked else [gradient], expert):
            self.found[name, i].append(part.double().reshape(-1, part.shape[-1]))


@pytest.mark.parametrize("architecture", [kind for kind in KINDS if kind in ARCHITECTURES])
def test_outputs_and_tokens_get_the_mean_squares_of_their_gradients(
    architecture: str, tmp_path: Path
) -> None:
    folder = save_tiny_model(architecture, tmp_path)
    found = sensitivities(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    seen, generator = Gradients(model), torch.Generator().manual_seed(5)
    for ids in IDS:
        with seen:
            scores = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        scores.gather(-1, drawn).sum().backward()
    assert {name for name, _ in seen.found if name.startswith(find_blocks(model))} == set(found)
    largest = max(
        float(g.square().sum(0).max()) for gradients in seen.found.values() for g in gradients
    )
    for name, matrices in found.items():
        for expert, sensitivity in enumerate(matrices):
            gradients = torch.cat(
                seen.found.get((name, expert), [torch.zeros(0, len(sensitivity.outputs))])
            )
            # fp32 against fp32 in another order of sums; one that is zero but for rounding is compared with the largest
            close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-9 * largest)
            close(sensitivity.outputs.double(), gradients.double().square().sum(0) / IDS.numel())
            norms = gradients.double().square().sum(1)
            assert len(sensitivity.tokens) == len(IDS)
            if norms.sum() > 1e-9 * largest:
                torch.testing.assert_close(
                    torch.cat(sensitivity.tokens).double(),
                    norms / norms.mean(),
                    rtol=1e-3,
                    atol=1e-4,
                )
    assert not list(folder.glob("*.bin"))


def test_half_the_weighted_square_of_a_small_error_is_the_growth_of_the_divergence(
    tmp_path: Path,
) -> None:
    """With the outputs of one layer disturbed by noise of its own at every token, KL grows by ½ Σ s σ²."""
    folder = save_tiny_model("llama", tmp_path)
    ids = torch.randint(3, 96, (16, 60), generator=torch.Generator().manual_seed(2))
    found = sensitivities(folder, ids)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    generator = torch.Generator().manual_seed(3)
    noise = 1e-3
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for name in (
            "model.layers.0.mlp.down_proj",
            "model.layers.1.self_attn.v_proj",
            "model.layers.1.mlp.up_proj",
        ):
            divergences = []
            for _ in range(2):
                disturb = partial(_disturbed, generator=generator, noise=noise)
                handle = model.get_submodule(name).register_forward_hook(disturb)
                after = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
                handle.remove()
                divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
            expected = float(found[f"{name}.weight"][0].outputs.double().sum()) * noise**2 / 2
            # the tokens are drawn, 960 of them, and a layer's early ones touch many later ones: 15 % were seen; a wrong ½ is 100 %
            assert sum(divergences) / 2 == pytest.approx(expected, rel=0.25), name


def _disturbed(
    _module: object, _inputs: object, y: Tensor, *, generator: torch.Generator, noise: float
) -> Tensor:
    return y + noise * torch.randn(y.shape, generator=generator, dtype=y.dtype)


def test_states_in_a_file_give_the_same_and_the_file_is_as_large_as_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model("llama", tmp_path)
    sizes: list[int] = []
    close = module.HiddenStates.close

    def measured(states: module.HiddenStates) -> None:
        sizes.extend(path.stat().st_size for path in folder.glob("*.bin"))
        close(states)

    in_memory = sensitivities(folder)
    monkeypatch.setattr(module.HiddenStates, "close", measured)
    in_file = sensitivities(folder, spill=True)
    for name, (one,) in in_memory.items():
        (other,) = in_file[name]
        assert torch.equal(one.outputs, other.outputs)
        assert all(map(torch.equal, one.tokens, other.tokens))
    config = open_model(str(folder)).config
    assert sizes == [boundary_bytes(IDS, config, torch.device("cpu"), 2, spill=True)]
    assert boundary_bytes(IDS, config, torch.device("cpu"), 2, spill=None) == 0


def test_numbers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("lm_head.weight", "model.norm.weight"):
            model.get_parameter(name).mul_(1e25)  # each is finite, their product isn't
    model.save_pretrained(tmp_path)
    with pytest.raises(WorkError, match="the model's logits: expected finite numbers"):
        sensitivities(tmp_path)
