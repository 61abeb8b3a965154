"""H = E[xxᵀ] of every layer, block by block, against a whole model in memory whose matrix products are watched."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from modulora_core.calibration import BlockWalk, CalibrationConfig, CalibrationText
from modulora_core.calibration.moments import SecondMoment
from modulora_core.calibration.observe import ObservedWeight
from modulora_core.errors import ModelError, WorkError
from modulora_core.models import open_model
from modulora_core.models.sites import find_sites
from modulora_core.spec import Calibration
from modulora_core.tests.products import second_moments
from modulora_core.tests.tiny_models import ARCHITECTURES, save_tiny_model, tiny_model

IDS = torch.randint(0, 96, (5, 24), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.usefixtures("one_thread")


class Seen:
    """Packs nothing: notes what it is given, and gives back what ``quantized`` makes of it."""

    def __init__(self, quantized: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.quantized = quantized
        self.calibrations: dict[tuple[str, int], Calibration] = {}
        self.weights: dict[str, list[Tensor]] = {}
        self.kept: dict[str, Tensor] = {}
        self.unwanted: set[str] = set()
        self.done: dict[str, list[Tensor]] = {}

    def keep(self, name: str, tensor: Tensor) -> None:
        self.kept[name] = tensor

    def wants_calibration(self, name: str) -> bool:
        return name not in self.unwanted

    def is_packed(self, name: str) -> bool:
        return name in self.done

    def restore(self, name: str) -> list[Tensor]:
        return self.done[name]

    def pack(
        self, name: str, matrices: Sequence[Tensor], calibrations: Iterable[Calibration | None]
    ) -> list[Tensor]:
        assert name not in self.weights
        self.weights[name] = [matrix.clone() for matrix in matrices]
        for i, calibration in enumerate(calibrations):
            if calibration is not None:
                self.calibrations[name, i] = calibration
        return [self.quantized(matrix) for matrix in matrices]


def walk(
    folder: Path, seen: Seen, ids: Tensor = IDS, *, paused_bytes: int = 2**30, **config: object
) -> BlockWalk:
    source = open_model(str(folder))
    linears = find_sites(source.skeleton()).linears
    text = CalibrationText(CalibrationConfig("ids", **config), ids)  # type: ignore[arg-type]
    made = BlockWalk(
        source, text, linears, device=torch.device("cpu"), folder=folder, paused_bytes=paused_bytes
    )
    made.run(seen)
    return made


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_gets_the_second_moment_of_its_inputs(
    architecture: str, tmp_path: Path
) -> None:
    folder = save_tiny_model(architecture, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    expected, seen = second_moments(model, IDS), Seen()
    done = walk(folder, seen, batch_size=2)
    reached = {key: found for key, found in seen.calibrations.items() if found.samples}
    assert set(reached) == {key for key in expected.inputs if key[0].startswith(done.blocks)}
    for (name, expert), found in reached.items():
        assert found.samples == sum(map(len, expected.inputs[name, expert]))
        assert error(found.hessian, expected.hessian(name, expert)) < 1e-5, (name, expert)
        assert torch.equal(found.hessian, found.hessian.t())
    matrices = {site.name: site.experts or 1 for site in find_sites(model).linears}
    unreached = [
        (name, i)
        for name, count in matrices.items()
        for i in range(count)
        if (name, i) not in reached
    ]
    assert sorted(done.unreached) == sorted(
        f"{name}[{i}]" for name, i in unreached if name in seen.weights
    )


@pytest.mark.parametrize("architecture", ["llama-biased", "gpt2", "mixtral"])
def test_every_parameter_of_the_blocks_is_given_once(architecture: str, tmp_path: Path) -> None:
    folder, seen = save_tiny_model(architecture, tmp_path, torch.bfloat16), Seen()
    blocks = walk(folder, seen).blocks
    source = open_model(str(folder))
    stored = {name: tensor for name, tensor in source.tensors() if name.startswith(blocks)}
    assert set(seen.kept) | set(seen.weights) == set(stored)
    for name, tensor in seen.kept.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, stored[name])
    for name, matrices in seen.weights.items():
        transposed = architecture == "gpt2"
        for matrix, expected in zip(
            matrices, stored[name] if len(matrices) > 1 else [stored[name]], strict=True
        ):
            assert torch.equal(matrix, (expected.t() if transposed else expected).float())


def halved(weight: Tensor) -> Tensor:
    """A coarse quantizer, so that it shows who has seen whose outputs."""
    return (weight * 4).round() / 4


STAGES = {
    "llama": (
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ),
    "phi3": (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
    "opt": (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)),
    "mixtral": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
}


@pytest.mark.parametrize("paused_bytes", [0, 2**30])
@pytest.mark.parametrize("architecture", STAGES)
def test_in_true_sequential_order_each_layer_sees_its_quantized_predecessors(
    architecture: str, paused_bytes: int, tmp_path: Path
) -> None:
    folder, seen = save_tiny_model(architecture, tmp_path), Seen(halved)
    blocks = walk(folder, seen, batch_size=2, paused_bytes=paused_bytes).blocks
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    for block in blocks:
        for stage in STAGES[architecture]:
            names = [
                n for n in seen.weights if n.startswith(block) and any(leaf in n for leaf in stage)
            ]
            expected = second_moments(model, IDS)
            for name, expert in (key for key in seen.calibrations if key[0] in names):
                if expected.inputs[name, expert]:
                    assert (
                        error(
                            seen.calibrations[name, expert].hessian, expected.hessian(name, expert)
                        )
                        < 1e-4
                    ), name
            with torch.no_grad():
                for name in names:
                    model.get_parameter(name).copy_(halved(model.get_parameter(name)))


def test_without_true_sequential_order_a_block_is_calibrated_dense(tmp_path: Path) -> None:
    folder, seen = save_tiny_model("llama", tmp_path), Seen(halved)
    blocks = walk(folder, seen, sequential=False).blocks
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for block in blocks:
        expected = second_moments(model, IDS)
        names = [name for name in seen.weights if name.startswith(block)]
        for name in names:
            assert error(seen.calibrations[name, 0].hessian, expected.hessian(name)) < 1e-4, name
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).copy_(halved(model.get_parameter(name)))


def test_pausing_and_running_again_give_the_same_bits(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    runs = [Seen(halved) for _ in range(3)]
    some = 3 * 2 * 24 * (32 + 48) * 4  # room for the activations of some batches
    for seen, room in zip(runs, (0, some, 2**30), strict=True):
        walk(folder, seen, batch_size=1, paused_bytes=room)
    for other in runs[1:]:
        assert all(torch.equal(runs[0].calibrations[key].hessian, found.hessian)
                   for key, found in other.calibrations.items())  # fmt: skip


def test_the_batch_size_changes_rounding_only(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    one, all_ = Seen(), Seen()
    walk(folder, one, batch_size=1)
    walk(folder, all_, batch_size=5)
    for key, found in one.calibrations.items():
        assert error(found.hessian, all_.calibrations[key].hessian.double()) < 1e-5


def test_spilled_hidden_states_give_the_same_bits_and_leave_no_file(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    before = sorted(folder.iterdir())
    kept, spilled = Seen(halved), Seen(halved)
    walk(folder, kept, spill=False)
    walk(folder, spilled, spill=True)
    assert all(torch.equal(kept.calibrations[key].hessian, spilled.calibrations[key].hessian)
               for key in kept.calibrations)  # fmt: skip
    assert sorted(folder.iterdir()) == before


def test_what_an_earlier_run_packed_is_taken_and_the_rest_sees_the_same(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path)
    whole = Seen(halved)
    walk(folder, whole)
    resumed = Seen(halved)
    names = [name for name in whole.weights if ".0." in name] + [
        "model.layers.1.self_attn.q_proj.weight"
    ]
    resumed.done = {name: [halved(matrix) for matrix in whole.weights[name]] for name in names}
    walk(folder, resumed)
    assert set(resumed.weights) == set(whole.weights) - set(names)
    for key, found in resumed.calibrations.items():
        assert torch.equal(found.hessian, whole.calibrations[key].hessian), key


def test_a_quantizer_that_wants_no_calibration_gets_none(tmp_path: Path) -> None:
    folder, seen = save_tiny_model("llama", tmp_path), Seen()
    seen.unwanted = {f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")}
    walk(folder, seen)
    assert seen.unwanted < set(seen.weights)
    assert not seen.unwanted & {name for name, _ in seen.calibrations}
    assert ("model.layers.1.mlp.down_proj.weight", 0) in seen.calibrations


@pytest.mark.parametrize("paused_bytes", [0, 2**30])
def test_one_block_is_dense_at_a_time(
    paused_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[ObservedWeight] = weakref.WeakSet()
    made = ObservedWeight.__init__

    def counted(self: ObservedWeight, *given: object) -> None:
        made(self, *given)  # type: ignore[arg-type]
        alive.add(self)

    class Counting(Seen):
        def pack(self, name: str, *given: object) -> list[Tensor]:  # type: ignore[override]
            assert len(alive) == 7, f"{name}: q, k, v, o, gate, up and down of its own block"
            return super().pack(name, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ObservedWeight, "__init__", counted)
    folder = save_tiny_model("llama", tmp_path)
    gc.disable()  # what a block holds must go when it is done, not when a collector comes by
    try:
        walk(folder, Counting(halved), batch_size=1, paused_bytes=paused_bytes)
    finally:
        gc.enable()
    assert not alive


def test_an_expert_without_tokens_gets_the_identity_and_is_reported(tmp_path: Path) -> None:
    folder, seen = save_tiny_model("mixtral", tmp_path), Seen()
    done = walk(folder, seen, IDS[:1, :1])  # one token reaches two of four experts
    assert len(done.unreached) == 8  # two experts of two weights in each of two blocks
    for name in done.unreached:
        stack, _, index = name.rstrip("]").partition("[")
        found = seen.calibrations[stack, int(index)]
        assert found.samples == 0
        assert torch.equal(found.hessian, torch.eye(found.hessian.shape[0]))


def test_inputs_that_are_not_finite_are_refused_with_the_layer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(1e38)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        WorkError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: expected finite inputs"
    ):
        walk(tmp_path, Seen())


def test_a_model_that_runs_its_blocks_in_another_order_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    folder = save_tiny_model("llama", tmp_path)
    forward = LlamaModel.forward

    def backwards(self: LlamaModel, *args: object, **kwargs: object) -> object:
        self.layers = torch.nn.ModuleList(reversed(self.layers))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", backwards)
    with pytest.raises(ModelError, match="once each, in order"):
        walk(folder, Seen())


def test_a_sum_of_outer_products_is_accurate_to_fp32(generator: torch.Generator) -> None:
    moment = SecondMoment(500, torch.device("cpu"))
    x = torch.randn(3000, 500, generator=generator) * torch.logspace(-3, 3, 500)
    for rows in x.split(700):
        moment.add(rows.view(-1, 1, 500))
    H = moment.mean("layer").hessian
    expected = x.double().t() @ x.double() / 3000
    scale = expected.diagonal().sqrt()
    assert float(((H - expected) / torch.outer(scale, scale)).abs().max()) < 1e-5
    assert moment.samples == 3000
