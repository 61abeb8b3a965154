"""H = E[xxᵀ] of every layer, block by block, against a whole model whose products are watched."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from modulora_core.calibration import (
    BlockVisitor,
    BlockWalk,
    CalibrationConfig,
    CalibrationText,
    HeldOutCalibration,
    find_blocks,
)
from modulora_core.calibration.observe import ObservedWeight
from modulora_core.calibration.walk import PAUSED_BYTES
from modulora_core.errors import ModelError, WorkError
from modulora_core.models import open_dense
from modulora_core.models.sites import find_sites
from modulora_core.tests.products import second_moments
from modulora_core.tests.tiny_models import EVERY_ARCHITECTURE, save_tiny_model, tiny_model

IDS = torch.randint(3, 96, (7, 24), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.usefixtures("one_thread")


class Seen(BlockVisitor):
    """Notes its arguments, and replaces each weight by the values that ``quantized`` returns."""

    def __init__(self, quantized=None):
        self.quantized = quantized
        self.calibrations = {}
        self.weights = {}
        self.dense = {}
        self.unwanted = set()
        self.written = {}

    def is_written(self, name):
        return name in self.written

    def write_dense(self, name, tensor):
        self.dense[name] = tensor

    def wants_calibration(self, name):
        return name not in self.unwanted

    def pack(self, name, matrices, calibrations):
        assert name not in self.weights
        self.weights[name] = [matrix.clone() for matrix in matrices]
        for i, calibration in enumerate(calibrations):
            if calibration is not None:
                self.calibrations[name, i] = calibration
        return self.quantized and packed(list(map(self.quantized, matrices)))

    def read(self, name):
        return packed(self.written[name])


def packed(values):
    return SimpleNamespace(values=lambda: values)


def coarse(weight):
    """Rounds so much that each layer's quantization changes the inputs of the next ones."""
    return (weight * 4).round() / 4


def walk(folder, seen, ids=IDS, paused_bytes=PAUSED_BYTES, **settings):
    own = ("held_out", "held_out_weights")
    of_walk = {name: settings.pop(name) for name in own if name in settings}
    source = open_dense(str(folder))
    linears = find_sites(source.skeleton()).linears
    text = CalibrationText(CalibrationConfig("ids", **settings), ids)
    walk = BlockWalk(source, text, linears, seen, torch.device("cpu"), folder, **of_walk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modulora_core.calibration.walk.PAUSED_BYTES", paused_bytes)
        walk.run()
    return walk


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


def error(found, expected):
    """Relative; sums of hundreds of fp32 products are within 1e-5 of fp64."""
    return float((found.double() - expected).norm() / expected.norm())


@EVERY_ARCHITECTURE
def test_every_layer_gets_the_second_moment_of_its_inputs(architecture, tmp_path):
    folder, seen = save_tiny_model(architecture, tmp_path), Seen()
    model = dense(folder)
    expected, done = second_moments(model, IDS), walk(folder, seen, batch_size=2)
    reached = {key: found for key, found in seen.calibrations.items() if found.samples}
    blocks = find_blocks(model)
    assert set(reached) == {key for key in expected.inputs if key[0].startswith(blocks)}
    for (name, expert), found in reached.items():
        assert found.samples == sum(map(len, expected.inputs[name, expert]))
        assert error(found.hessian, expected.hessian(name, expert)) < 1e-5, (name, expert)
        assert torch.equal(found.hessian, found.hessian.t())
    unreached = seen.calibrations.keys() - reached.keys()
    assert sorted(done.unreached) == sorted(f"{name}[{i}]" for name, i in unreached)


LLAMA = "q_proj k_proj v_proj, o_proj, gate_proj up_proj, down_proj"


@pytest.mark.parametrize(
    ("architecture", "paused_bytes", "stages"),
    [
        ("llama", 2**30, LLAMA),
        ("llama", 0, LLAMA),
        ("opt", 2**30, "q_proj k_proj v_proj, out_proj, fc1, fc2"),
        ("mixtral", 2**30, "q_proj k_proj v_proj, o_proj, gate_up_proj, down_proj"),
        ("llama", None, "_proj"),  # not sequential: each block is calibrated dense
    ],
)
def test_each_layer_sees_its_quantized_predecessors(architecture, paused_bytes, stages, tmp_path):
    folder, seen = save_tiny_model(architecture, tmp_path), Seen(coarse)
    how = {"sequential": False} if paused_bytes is None else {"paused_bytes": paused_bytes}
    walk(folder, seen, batch_size=2, **how)
    model = dense(folder)
    unseen = {key for key, found in seen.calibrations.items() if found.samples}
    for block in find_blocks(model):
        for stage in stages.split(", "):
            inside = {name: name.removesuffix(".weight") for name in seen.weights if block in name}
            names = {name for name, path in inside.items() if path.endswith(tuple(stage.split()))}
            expected = second_moments(model, IDS)
            for key in [key for key in unseen if key[0] in names]:
                assert error(seen.calibrations[key].hessian, expected.hessian(*key)) < 1e-4, key
                unseen.remove(key)
            with torch.no_grad():
                for name in names:
                    model.get_parameter(name).copy_(coarse(model.get_parameter(name)))
    assert not unseen


def test_pausing_running_again_and_spilling_give_the_same_bits(tmp_path):
    folder = save_tiny_model("llama", tmp_path)
    files = sorted(folder.iterdir())
    some = 3 * 2 * 24 * (32 + 48) * 4  # room for the activations of some batches
    runs = []
    spilled = {"spill": True}
    for how in ({"paused_bytes": 0}, {"paused_bytes": some}, {"paused_bytes": 2**30}, spilled):
        runs.append(Seen(coarse))
        walk(folder, runs[-1], batch_size=1, **how)
    for other in runs[1:]:
        for key, found in other.calibrations.items():
            assert torch.equal(found.hessian, runs[0].calibrations[key].hessian), key
    assert sorted(folder.iterdir()) == files


@pytest.mark.parametrize(
    ("architecture", "paused_bytes", "matrices"),
    [("llama", 0, 7), ("llama", 2**30, 7), ("mixtral", 0, 4 + 2 * 4)],
)
def test_one_block_is_dense_at_a_time(architecture, paused_bytes, matrices, tmp_path, monkeypatch):
    alive = weakref.WeakSet()
    made = ObservedWeight.__init__

    def counted(self, *given):
        made(self, *given)
        alive.add(self)

    class Counting(Seen):
        def pack(self, name, *given):
            assert len(alive) == matrices, name
            return super().pack(name, *given)

    monkeypatch.setattr(ObservedWeight, "__init__", counted)
    folder = save_tiny_model(architecture, tmp_path)
    gc.disable()  # a block must go when it is done, and not when a collector comes by
    try:
        walk(folder, Counting(coarse), batch_size=1, paused_bytes=paused_bytes)
    finally:
        gc.enable()
    assert not alive


def test_an_expert_without_tokens_gets_the_identity_and_is_listed(tmp_path):
    folder, seen = save_tiny_model("mixtral", tmp_path), Seen()
    done = walk(folder, seen, IDS[:1, :1])  # one token reaches two of four experts
    assert len(done.unreached) == 8  # two experts of two weights in each of two blocks
    for name in done.unreached:
        stack, _, index = name.rstrip("]").partition("[")
        found = seen.calibrations[stack, int(index)]
        assert found.samples == 0
        assert torch.equal(found.hessian, torch.eye(found.hessian.shape[0]))


@pytest.mark.parametrize("paused_bytes", [0, 2**30])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_held_out_samples_have_a_weighted_second_moment_of_their_own(
    architecture, paused_bytes, tmp_path
):
    folder, seen = save_tiny_model(architecture, tmp_path), Seen()
    model, first = dense(folder), 5
    calibrating = second_moments(model, IDS[:first])
    held_out = [second_moments(model, ids[None]).inputs for ids in IDS[first:]]
    generator = torch.Generator().manual_seed(2)
    weights = {
        site.name: [
            [torch.rand(sum(map(len, x[site.name, i])), generator=generator) for x in held_out]
            for i in range(site.experts or 1)
        ]
        for site in find_sites(model).linears
    }
    # batches don't end where the held-out samples begin
    held = {"held_out": len(IDS) - first, "held_out_weights": weights}
    walk(folder, seen, batch_size=4, paused_bytes=paused_bytes, **held)
    for (name, i), found in seen.calibrations.items():
        assert isinstance(found, HeldOutCalibration)
        assert found.samples == sum(map(len, calibrating.inputs[name, i]))
        if found.samples:
            assert error(found.hessian, calibrating.hessian(name, i)) < 1e-5, (name, i)
        inputs = [x for sample in held_out for x in sample[name, i]]
        assert found.held_out.samples == sum(map(len, inputs))
        if inputs:
            x, w = torch.cat(inputs), torch.cat(weights[name][i]).double()
            expected = (x * w[:, None]).t() @ x / len(x)
            assert error(found.held_out.hessian, expected) < 1e-5, (name, i)


def test_inputs_that_are_not_finite_are_refused_with_the_layer(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(1e38)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        WorkError, match=r"layers\.1\.mlp\.down_proj\.weight: expected finite inputs"
    ):
        walk(tmp_path, Seen())


def test_a_model_that_runs_its_blocks_in_another_order_is_refused(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    folder, forward = save_tiny_model("llama", tmp_path), LlamaModel.forward

    def backwards(self, *args, **kwargs):
        self.layers = torch.nn.ModuleList(reversed(self.layers))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", backwards)
    with pytest.raises(ModelError, match="once each, in order"):
        walk(folder, Seen())
