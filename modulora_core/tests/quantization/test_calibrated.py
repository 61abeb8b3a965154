"""Quantizing with calibration and tuning: the record, refusals, the command line, killed runs."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from modulora_core import registry
from modulora_core.calibration import CalibrationConfig, TuningConfig
from modulora_core.checkpoints.opening import open_packed
from modulora_core.checkpoints.outputs import partial_name
from modulora_core.cli import main
from modulora_core.errors import CheckpointError, DataError, OptionError
from modulora_core.hf.load_model import load_model
from modulora_core.quantization.quantize import quantize
from modulora_core.tests import scaled_quantizer, width_quantizer
from modulora_core.tests.scaled_quantizer import save_model_with_tokenizer
from modulora_core.tests.stopped_runs import stop, stored

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory):
    """A folder on the path with ``plain`` and with ``heeding``, which needs calibration."""
    root = tmp_path_factory.mktemp("widths-site")
    with width_quantizer.installed(root):
        yield root


@pytest.fixture(scope="module", autouse=True)
def scaled(tmp_path_factory):
    """The module of ``scaled``, whose calibration is optional, and which can be tuned."""
    with scaled_quantizer.installed(tmp_path_factory.mktemp("scaled-site")) as module:
        yield module


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    return str(save_model_with_tokenizer("llama-biased", folder, "bfloat16"))


OUTSIDE, IN_BLOCK = 3, 16
"""Parameters outside of the two blocks (embeddings, norm, head), and in one (7 weights, 7 biases,
2 norms)."""

TUNING = TuningConfig(epochs=2, learning_rate=2e-2)


def text(**changed):
    settings = {"source": "pydoc[:10%]", "samples": 6, "seq_len": 32, "batch_size": 2, **changed}
    return CalibrationConfig(**settings)


def run(source, out, quantizer="heeding", **arguments):
    calibration = text(tuning=TUNING if quantizer == "scaled" else None)
    return quantize(source, out, quantizer, **{"calibration": calibration, "seed": 1, **arguments})


@pytest.fixture(scope="module", params=["heeding", "scaled"])
def whole(request, source, tmp_path_factory):
    """A quantizer, its checkpoint and its result; ``scaled`` is tuned."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return request.param, out, run(source, out, request.param)


def test_the_samples_are_recorded_and_the_model_loads(whole, capsys):
    quantizer, out, result = whole
    record = open_packed(out).record.calibration
    assert record["tokens_sha256"]
    assert record == result.calibration
    samples = {"source": "pydoc[:10%]", "samples": 6, "seq_len": 32, "batch_size": 2}
    assert {key: record[key] for key in samples} == samples
    tuning = {"epochs": 2, "learning_rate": 0.02, "batch_size": 16}  # of 32 tokens
    assert record.get("tuning") == (tuning if quantizer == "scaled" else None)
    assert (result.tuning_errors is not None) == (quantizer == "scaled")
    load_model(out, device="cpu")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == record


def test_the_command_line_gives_the_same_bytes(whole, source, tmp_path, capsys):
    quantizer, out, result = whole
    samples = "--calibration pydoc[:10%] --samples 6 --seq-len 32 --batch-size 2 --spill"
    tune = "--tune-epochs 2 --tune-lr 0.02" if quantizer == "scaled" else ""
    words = f"-q {quantizer} {samples} {tune} --seed 1 --json".split()
    assert main(["quantize", source, str(tmp_path / "out"), *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["calibration"] == result.calibration
    assert printed["unreached"] == []
    assert printed["tuning_errors"] == json.loads(json.dumps(result.tuning_errors))
    assert stored(tmp_path / "out") == stored(out)


def test_a_layer_outside_of_the_blocks_stays_dense_if_it_needs_calibration(tmp_path):
    opt = save_model_with_tokenizer("opt", tmp_path / "opt")
    kept = run(str(opt), tmp_path / "out").kept
    reason = "outside of the decoder blocks, where nothing is calibrated"
    assert {name.split(".")[-2] for name in kept[reason]} == {"project_in", "project_out"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"calibration": None}, OptionError, "heeding: expected a calibration text"),
        ({"quantizer": "toy"}, OptionError, "toy uses none"),
        ({"calibration": text(samples=10**6)}, DataError, "1000000 samples"),
        ({"calibration": text(seq_len=4096)}, OptionError, "at most 64, the context"),
        ({"include": ["lm_head"]}, OptionError, "lm_head is outside of the decoder blocks"),
        ({"quantizer": "toy", "calibration": text(tuning=TUNING)}, OptionError, "got toy; leave"),
        ({"calibration": text(tuning=TUNING, samples=1)}, DataError, "tuning: expected at least 2"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_and_writes_nothing(
    source, toy, tmp_path, arguments, error, message
):
    with pytest.raises(error, match=message):
        run(source, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("quantizer", "after", "packed_again"),
    [
        ("heeding", OUTSIDE + 9 + 4, 10),  # a block's biases and norms come first
        ("scaled", OUTSIDE + 9, 14),
        ("scaled", OUTSIDE + 2 * IN_BLOCK - 1, 7),
    ],
)
def test_a_resumed_run_packs_missing_parameters_or_tunes_missing_blocks(
    quantizer, after, packed_again, source, tmp_path, monkeypatch
):
    whole = run(source, tmp_path / "whole", quantizer)
    out = tmp_path / "out"
    stop(lambda: run(source, out, quantizer), after)
    journal = (partial_name(out) / "written.jsonl").read_text()
    assert len(journal.splitlines()) == after
    cls = registry.load(quantizer)
    packed, pack = list[int](), cls.pack
    monkeypatch.setattr(cls, "pack", lambda *given: packed.append(1) or pack(*given))
    calls = []
    result = run(source, out, quantizer, resume=True, progress=lambda *call: calls.append(call))
    layouts = len(open_packed(out).record.sites)  # Quantizer.layout() packs each kind once
    assert len(packed) - layouts == packed_again
    assert stored(out) == stored(tmp_path / "whole")
    done = [(done, total) for phase, done, total in calls if phase in ("packing", "tuning")]
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]
    assert ("tuning" in {phase for phase, _, _ in calls}) == (quantizer == "scaled")
    if quantizer == "scaled":
        errors, expected = result.tuning_errors, whole.tuning_errors
        assert errors == {path: expected[path] for path in list(expected)[-len(errors) :]}


@pytest.mark.parametrize(("calibrated", "offered"), [("heeding", {"bits": 4}), ("scaled", {})])
def test_a_quality_stands_for_its_settings(calibrated, offered, source, tmp_path):
    tuning = TuningConfig(epochs=1) if calibrated == "scaled" else None
    plain, best = text(samples=None), text(weighting="loss", tuning=tuning)
    for name, found, expected, options in (
        ("fast", text(samples=None), text(samples=32, weighting="none"), {}),
        ("best", text(), best, offered),
        ("balanced", plain, text(samples=128, weighting="loss"), {}),
    ):
        if tuning is not None and name != "best":
            continue  # channel scales change the best quality alone
        run(source, tmp_path / name, calibrated, calibration=found, quality=name)
        run(source, tmp_path / "same" / name, calibrated, options=options, calibration=expected)
        assert stored(tmp_path / name) == stored(tmp_path / "same" / name)
    own = text(weighting="none", tuning=TuningConfig(epochs=0))
    arguments = {"options": dict.fromkeys(offered, 8), "calibration": own}
    run(source, tmp_path / "own", calibrated, quality="best", **arguments)
    run(source, tmp_path / "plain", calibrated, **arguments)
    assert stored(tmp_path / "own") == stored(tmp_path / "plain")


@pytest.fixture(scope="module")
def stopped(source, tmp_path_factory):
    """The place of a killed run; other requests leave it as it is."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    stop(lambda: run(source, out, "scaled"), after=5)
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"calibration": text(tuning=TUNING, source="pydoc[:20%]")}, "calibration"),
        ({"calibration": text()}, "calibration"),
        ({"quantizer": "heeding", "calibration": text()}, "recipes"),
    ],
)
def test_a_changed_request_is_not_resumed(source, stopped, change, named):
    before = stored(partial_name(stopped))
    assert before
    with pytest.raises(CheckpointError, match=f"differs in .*{named}.*without --resume"):
        run(source, stopped, **{"quantizer": "scaled", "resume": True, **change})
    assert stored(partial_name(stopped)) == before


def test_a_changed_text_or_changed_weights_are_not_resumed(source, tmp_path):
    path, copy, out = tmp_path / "text.txt", tmp_path / "copy", tmp_path / "out"
    words = "The quick brown fox jumps over the lazy dog. " * 200
    path.write_text(words)
    shutil.copytree(source, copy)
    calibration = CalibrationConfig(str(path), samples=6, seq_len=32)
    stop(lambda: run(str(copy), out, calibration=calibration), after=5)
    path.write_text(words.replace("lazy", "sleepy"))
    with pytest.raises(CheckpointError, match="differs in calibration"):
        run(str(copy), out, calibration=calibration, resume=True)
    path.write_text(words)
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="differs in the values of the model's weights"):
        run(str(copy), out, calibration=calibration, resume=True)
