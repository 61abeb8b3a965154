"""The kit against quantizers that are broken on purpose: each fails the check made for it."""

from __future__ import annotations

import importlib
from pathlib import Path

import modulora_zoo
import pytest
from modulora_conformance.checks import checks_of
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_conformance.interpreted_kernels import run_interpreted
from modulora_conformance.suite import QuantizerConformance


def members(kernels: bool) -> dict[str, type]:
    """The classes of the zoo by name: for the levels, or for the checks of compiled kernels."""
    chosen = {
        name: spec.location.split(":")[0]
        for name, spec in modulora_zoo.SPECS.items()
        if kernels == spec.location.startswith(("modulora_zoo.kernels", "zoo_heavy"))
    }
    return {name: getattr(importlib.import_module(m), name) for name, m in chosen.items()}


LEVELS, KERNELS = members(kernels=False), members(kernels=True)
BROKEN = [name for name in LEVELS if name not in modulora_zoo.SOUND]
BROKEN_KERNELS = [name for name in KERNELS if name not in modulora_zoo.SOUND]


@pytest.fixture(scope="module")
def made_for_it(nested):
    """A run of each broken one's own check, and of everything for the healthy one."""
    return nested("TestHealthy", *(f"Test{name}::{LEVELS[name].breaks}" for name in BROKEN))


@pytest.fixture(scope="module")
def everything(nested):
    return nested(*(f"Test{name}" for name in LEVELS), words=["--certified"])


@pytest.fixture(scope="module")
def kernels(nested):
    checks = {name: KERNELS[name].breaks for name in BROKEN_KERNELS}
    checks["PacksInCopies"] += "[kernels]"  # without kernels it takes seconds
    return nested("TestSound", *(f"Test{name}::{check}" for name, check in checks.items())).outcomes


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_fails_the_check_made_for_it(name, made_for_it):
    cls = LEVELS[name]
    found = [check.reason for check in made_for_it.runs[cls.spec.name].failures]
    assert found
    assert getattr(cls, "says", "") in found[0]


def test_the_healthy_one_fails_nothing(made_for_it):
    run = made_for_it.runs["zoo-healthy"]
    assert run.failures == ()
    assert run.complete


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_fails_no_other_check(name, everything):
    """If this fails: the fault shows in several checks. One of them ``needs`` the other."""
    run = everything.runs[LEVELS[name].spec.name]
    assert {check.check for check in run.failures} == {LEVELS[name].breaks}
    assert not run.certified


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LEVELS if name in modulora_zoo.SOUND])
def test_a_sound_one_is_certified(name, everything):
    assert everything.runs[LEVELS[name].spec.name].certified


@pytest.mark.parametrize("name", BROKEN_KERNELS)
def test_broken_kernels_fail_the_check_made_for_them(name, kernels):
    found = [kind for node, kind in kernels.items() if node.startswith(f"Test{name}::")]
    assert set(found) == {"failed"}


def test_sound_kernels_pass(kernels):
    found = [kind for node, kind in kernels.items() if node.startswith("TestSound::")]
    assert "failed" not in found
    assert found.count("passed") >= 7


def test_interpreted_kernels_that_omit_columns_are_found(zoo):
    pytest.importorskip("triton")
    with pytest.raises(AssertionError) as failed:
        run_interpreted(Path(zoo.__file__).parents[1] / "check_interpreted.py")
    summary = str(failed.value)
    assert "TestWithoutMask::test_tiles_are_the_reference_bit_for_bit" in summary
    assert "TestWithoutMask::test_products_are_those_of_the_reference" in summary
    assert "TestInTriton::" not in summary


CORE = "the core does it; no quantizer breaks it and passes the checks that it needs"
NO_DEVICE = "skipped without a CUDA device"
GOLDEN = "test_golden.py breaks it"

UNBROKEN = {
    "test_packing_gives_the_golden_vectors": GOLDEN,
    "test_tiles_give_the_golden_vectors": GOLDEN,
    "test_gradients_pass_finite_differences": "the check before it finds the same faults first",
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
"""Checks that no quantizer of the zoo breaks alone, and the reason."""


def test_every_check_is_broken_by_some_quantizer_or_has_a_reason():
    """If this fails: perhaps a new check cannot fail. Write the quantizer that fails it."""
    checks = {name for name, _, _ in checks_of(QuantizerConformance)}
    broken = {LEVELS[name].breaks for name in BROKEN}
    assert broken <= checks
    assert checks - broken == set(UNBROKEN)
    of_kernels = {name for name in vars(CompiledKernels) if name.startswith("test_")}
    assert of_kernels == {KERNELS[name].breaks for name in BROKEN_KERNELS}
