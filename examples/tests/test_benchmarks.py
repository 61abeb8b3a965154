"""The benchmarks measure, and say what they did not measure. Their speed is not tested."""

import json
import statistics

import pytest

pytest.importorskip("modulora_nf4", reason="pip install ./plugins/nf4")

MISSING = "modulora-no-such-library"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model):
    """The flags of a tiny model, and of a folder that the benchmarks share."""
    return ["--model", tiny_model, "--folder", str(tmp_path_factory.mktemp("models"))]


@pytest.fixture
def run(module, tmp_path, monkeypatch, capsys):
    """Runs a benchmark here with nf4 and a peer that is not installed; returns its JSON."""
    monkeypatch.setattr(module("peers").Bitsandbytes, "distributions", (MISSING,))

    def call(name, *flags):
        file = tmp_path / f"{name}.json"
        words = ["-q", "nf4", "-p", "bitsandbytes-nf4", "--quick", "--one-process"]
        assert module(name).main([*words, "--json", str(file), *flags]) == 0
        found = json.loads(file.read_text())
        assert found["benchmark"] == name
        assert "torch" in found["environment"]["versions"]
        printed = capsys.readouterr().out
        for line in found["not_measured"]:
            assert line["reason"] == f"{MISSING} isn't installed; pip install {MISSING}"
            assert f"{line['method']}; " in printed or f"{line['method']}: not measured" in printed
        return {**found, "printed": printed}

    return call


def of(found, method, **facts):
    """The one result of a method with these facts."""
    (result,) = (r for r in found["results"] if r["method"] == method and r | facts == r)
    return dict(result)


def check_turns(results, base):
    """A ratio is a median over turns; the base has 1."""
    assert base["ratio"] == base["low_ratio"] == 1
    for result in results:
        assert result["seconds"] == statistics.median(result["samples"])
        ratios = [a / b for a, b in zip(result["samples"], base["samples"], strict=True)]
        assert min(ratios) <= result["ratio"] <= max(ratios)


def test_layer_measures_every_case(run, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    picture = tmp_path / "layer.svg"
    found = run("layer", "--rows", "1", "5", "--plot", str(picture))
    assert "nf4" in picture.read_text()
    assert "bitsandbytes-nf4" in {line["method"] for line in found["not_measured"]}
    results = found["results"]
    assert len(results) == 2 * 2 * 2 * 2, "methods, passes, rows, dtypes"
    for passes in ("forward", "forward + backward"):
        for rows in (1, 5):
            case = [r for r in results if (r["passes"], r["rows"]) == (passes, rows)]
            base = of(found, "dense", passes=passes, rows=rows, dtype="float32")
            check_turns(case, base)
    ours = of(found, "nf4", passes="forward", rows=1, dtype="float32")
    assert 0.05 < ours["relative_error"] < 0.15, "its promise for Gaussian weights is 0.097"
    assert ours["bytes"] == 128 * 128 // 2 + 128 * 128 // 64 * 4, "4 bits, and a scale for 64"


def test_training_compares_steps(run, models):
    found = run("training", *models)
    dense, ours = of(found, "dense"), of(found, "nf4")
    check_turns(found["results"], dense)
    assert ours["trained"] == dense["trained"], "PEFT's adapter has as many parameters as ours"
    assert ours["loss"] == pytest.approx(dense["loss"], rel=0.1)
    assert min(dense["peak_memory_bytes"], ours["peak_memory_bytes"]) > 10 * 2**20


def test_decoding_compares_rates_in_both_dtypes(run, models):
    found = run("decoding", *models, "--length", "5")
    check_turns(found["results"], of(found, "dense", dtype="float32"))
    assert {r["dtype"] for r in found["results"]} == {"float32", "bfloat16"}
    assert {(r["new_tokens"], len(r["ids"])) for r in found["results"]} == {(5, 5)}


def test_quality_measures_perplexity_and_size(run, models):
    pytest.importorskip("modulora_optq", reason="pip install ./plugins/optq")
    flags = ["-q", "nf4:block_size=32", "optq:bits=3", "--uncalibrated", "optq:bits=3"]
    found = run("quality", *models, *flags)
    assert of(found, "original")["bits_per_weight"] is None
    assert of(found, "optq:bits=3, H = I")["bits_per_weight"] < 4
    assert of(found, "nf4:block_size=32")["bits_per_weight"] == 5, "4 bits, and a scale for 32"
    assert of(found, "optq:bits=3")["quantizing_seconds"] > 0
    (values,) = {tuple(r["perplexity"]) for r in found["results"]}
    assert values == ("pydoc[80%:]",)
    perplexity = {r["method"]: r["perplexity"]["pydoc[80%:]"] for r in found["results"]}
    assert len(set(perplexity.values())) == 4, "H = I gives other values too"
