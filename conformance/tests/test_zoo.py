"""The kit against quantizers that are broken on purpose: each fails the check made for it and no other; the healthy one fails none."""

from __future__ import annotations

import importlib
from typing import Any

import modulora_zoo
import pytest
import zoo_runs
from modulora_conformance.checks import checks_of
from modulora_conformance.results import ALLOWED_SKIPS
from modulora_conformance.suite import QuantizerConformance

from modulora_core.spec import Quantizer

pytestmark = pytest.mark.slow

BROKEN = [name for name in modulora_zoo.SPECS if name not in modulora_zoo.SOUND]


def member(name: str) -> Any:
    module, _ = modulora_zoo.SPECS[name].location.split(":")
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return zoo_runs.run_all(tmp_path_factory.mktemp("zoo"), tuple(modulora_zoo.SPECS))


@pytest.mark.parametrize("name", modulora_zoo.SOUND)
def test_a_sound_one_is_certified(name: str, results: dict[str, dict[str, Any]]) -> None:
    found = results[modulora_zoo.SPECS[name].name]
    assert found["failures"] == []
    allowed = [
        c
        for c in found["checks"]
        if c["outcome"] == "passed" or c["reason"].startswith(ALLOWED_SKIPS)
    ]
    assert allowed == found["checks"]
    assert found["certified"] is True


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_fails_the_check_made_for_it_and_no_other(
    name: str, results: dict[str, dict[str, Any]]
) -> None:
    """If this fails: a check misses its bug, or a bug shows in several checks: then one `needs` the other."""
    found = results[modulora_zoo.SPECS[name].name]
    failed = {f["check"]: f["reason"] for f in found["failures"]}
    assert set(failed) == {member(name).breaks}, failed
    assert getattr(member(name), "says", "") in failed[member(name).breaks]
    assert found["certified"] is False


def test_every_class_of_the_zoo_is_run() -> None:
    written = {
        value.__name__
        for module in modulora_zoo.MEMBERS
        for value in vars(importlib.import_module(f"modulora_zoo.{module}")).values()
        if isinstance(value, type)
        and issubclass(value, Quantizer)
        and value.__module__.startswith("modulora_zoo")
    }
    assert written == set(modulora_zoo.SPECS)
    assert len(BROKEN) >= 25


CORE = "what it holds is the core's doing; no quantizer is left that breaks it and passes what it needs"
NO_DEVICE = "skipped where there is no CUDA device"

UNBROKEN = {
    "test_packing_gives_the_golden_vectors": "test_golden.py breaks it",
    "test_tiles_give_the_golden_vectors": "test_golden.py breaks it",
    "test_gradients_pass_finite_differences": "a second oracle for the check before it, which finds the same bugs first",
    "test_moving_keeps_bytes_and_layout": CORE,
    "test_a_state_dict_brings_the_weight": CORE,
    "test_a_cast_of_the_model_keeps_packed_dtypes": CORE,
    "test_a_deep_copy_is_independent": CORE,
    "test_a_transformer_is_quantized_saved_and_loaded": CORE,
    "test_a_transformer_trains_as_the_dense_one": CORE,
    "test_a_checkpoint_of_another_format_is_refused": CORE,
    "test_a_compiled_layer_gives_the_eager_results": CORE,
    "test_peak_memory_on_cuda_is_tiles_and_activations": NO_DEVICE,
    "test_cuda_gives_the_tiles_of_the_cpu": NO_DEVICE,
    "test_cuda_gives_the_products_and_gradients_of_the_dense_layer": NO_DEVICE,
}
"""Checks that no quantizer of the zoo breaks alone, and why."""


def test_every_check_is_broken_by_some_quantizer_or_has_a_reason() -> None:
    """If this fails: a new check is one that perhaps can't fail. Write the quantizer that fails it."""
    checks = {name for name, _, _ in checks_of(QuantizerConformance)}
    broken = {member(name).breaks for name in BROKEN}
    assert broken <= checks
    assert checks - broken == set(UNBROKEN)
