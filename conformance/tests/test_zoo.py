"""The kit against quantizers that are broken on purpose: each fails the check made for it."""

import importlib
import zlib
from pathlib import Path

import modulora_zoo
import pytest
from modulora_conformance.checks import GUARD, checks_of, needed_by
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_conformance.interpreted_kernels import run_interpreted
from modulora_conformance.suite import QuantizerConformance


def members(kernels):
    """The classes of the zoo by name: for the levels, or for the checks of compiled kernels."""
    chosen = {
        name: spec.location.split(":")[0]
        for name, spec in modulora_zoo.SPECS.items()
        if kernels == spec.location.startswith("modulora_zoo.kernels")
        and name not in modulora_zoo.UNMET
    }
    return {name: getattr(importlib.import_module(m), name) for name, m in chosen.items()}


CHECKS = {name: level.level for name, _, level in checks_of(QuantizerConformance)}
LEVELS, KERNELS = members(kernels=False), members(kernels=True)
BROKEN = [name for name in LEVELS if name not in modulora_zoo.SOUND]
FEW = [name for name in BROKEN if CHECKS[LEVELS[name].breaks] != "L9"][::12]
"""A quick sample, without those that other checks must meet. The slow tests have all."""
BROKEN_KERNELS = [name for name in KERNELS if name not in modulora_zoo.SOUND]


NEEDED = {n: needed_by(check, level.level) for n, check, level in checks_of(QuantizerConformance)}

SLOW = {
    "test_metadata_is_imported_fast",
    "test_metadata_is_known_without_torch",
    "test_another_process_reads_the_same_weight",
    "test_another_process_packs_the_same_bytes",
    "test_two_threads_may_be_the_first_to_read",
    "test_options_keep_apart",
    "test_crafted_tensors_are_refused_or_read_in_bounds",
    "test_a_transformer_is_quantized_saved_and_loaded",
    "test_a_transformer_trains_as_the_dense_one",
    "test_a_compiled_layer_gives_the_eager_results",
    "test_nothing_is_unpickled",
    "test_packed_tensors_are_only_read",
    "test_nothing_beside_the_tensors_is_read",
    "test_without_numba_the_values_are_the_same",
}
"""Checks of other processes, of the compiler, and of a whole model."""

HEAVY = {
    name
    for name in CHECKS
    for part in (
        "plugin_names",
        "drawn_anew",
        "real_layer",
        "common_sides",
        "any_number",
        "thousand",
        "many_uses",
    )
    if part in name
}
"""Checks that take seconds: only the healthy one, and those that they are made for, meet them. The
plugins' certificates show that they pass sound quantizers of all kinds."""

OWN, OTHERS = 8, 96
"""A broken quantizer meets one in so many checks of its own level, and of other levels. It meets
checks of :data:`SLOW` of its own level alone."""


def needed(check):
    """A check, and all checks that it needs."""
    return {check}.union(*(needed(name) for name in NEEDED[check]))


def is_sampled(cls, check):
    """Whether a quantizer meets a check: the checks that its own needs, and a sample of others."""
    breaks = getattr(cls, "breaks", None)
    if breaks is None:
        return check not in SLOW | HEAVY or cls.__name__ == "Healthy"
    if check in needed(breaks):
        return True
    if check in HEAVY:
        return False
    is_own = CHECKS[check] == CHECKS[breaks]
    if (check in SLOW and not is_own) or breaks in needed(check):
        return False  # the latter would be blocked
    one_of = OWN if is_own else OTHERS
    return zlib.crc32(f"{cls.__name__} {check}".encode()) % one_of == 0


def sampled(cls, check):
    return check == GUARD or is_sampled(LEVELS[cls.removeprefix("Test")], check)


def sampled_fast(cls, check):
    return sampled(cls, check) and not (cls == "TestHealthy" and check in SLOW | HEAVY)


@pytest.fixture(scope="module")
def few(request, nested):
    """A run of some broken ones' own checks, and of the healthy one's fast checks, or of all."""
    if any("everything" in item.fixturenames for item in request.session.items):
        return request.getfixturevalue("everything")
    broken = (f"Test{name}::{LEVELS[name].breaks}" for name in FEW)
    return nested("TestHealthy", *broken, chosen=sampled_fast)


@pytest.fixture(scope="module")
def everything(nested):
    return nested(*(f"Test{name}" for name in LEVELS), chosen=sampled)


@pytest.fixture(scope="module")
def kernels(nested):
    checks = {name: KERNELS[name].breaks for name in BROKEN_KERNELS}
    checks["PacksInCopies"] += "[kernels]"  # without kernels it takes seconds
    return nested("TestSound", *(f"Test{name}::{check}" for name, check in checks.items())).outcomes


@pytest.mark.parametrize("name", FEW)
def test_a_broken_one_fails_the_check_made_for_it(name, few):
    """If this fails: the message does not name the fault, or the check does not find it."""
    check_found(LEVELS[name], few)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_fails_that_check_alone(name, everything):
    """If this fails: the fault shows in several checks. One of them ``needs`` the other."""
    cls = LEVELS[name]
    check_found(cls, everything)
    found = {check.check for check in everything.runs[cls.spec.name].failures}
    assert found == {cls.breaks}


def check_found(cls, nested):
    run = nested.runs[cls.spec.name]
    found = [check.reason for check in run.failures if check.check == cls.breaks]
    assert found, f"{cls.breaks} passed"
    assert any(getattr(cls, "says", "") in reason for reason in found), found
    assert not run.certified


def test_the_healthy_one_fails_nothing(few):
    run = few.runs["zoo-healthy"]
    assert run.failures == ()
    assert run.count("passed") > 150


@pytest.mark.slow
def test_the_healthy_one_meets_every_check(everything):
    assert everything.runs["zoo-healthy"].complete


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LEVELS if name in modulora_zoo.SOUND])
def test_a_sound_one_fails_nothing(name, everything):
    run = everything.runs[LEVELS[name].spec.name]
    assert not [check for check in run.checks if check.uncertified]


def test_the_zoo_is_large():
    assert len(BROKEN) + len(BROKEN_KERNELS) >= 100


@pytest.mark.parametrize("name", BROKEN_KERNELS)
def test_broken_kernels_fail_the_check_made_for_them(name, kernels):
    found = [kind for node, kind in kernels.items() if node.startswith(f"Test{name}::")]
    assert set(found) == {"failed"}


def test_sound_kernels_pass(kernels):
    found = [kind for node, kind in kernels.items() if node.startswith("TestSound::")]
    assert "failed" not in found
    assert found.count("passed") >= 2


def test_interpreted_kernels_that_omit_columns_are_found(zoo):
    pytest.importorskip("triton")
    with pytest.raises(AssertionError) as failed:
        run_interpreted(Path(zoo.__file__).parents[1] / "check_interpreted.py")
    summary = str(failed.value)
    assert "TestWithoutMask::test_tiles_are_the_reference_bit_for_bit" in summary
    assert "TestWithoutMask::test_products_are_those_of_the_reference" in summary
    assert "TestInTriton::" not in summary


CORE = "the core does it; no quantizer breaks it and passes the checks that it needs"
NO_VLLM = "skipped without vLLM"
NO_DEVICE = "skipped without a CUDA device"
GOLDEN = "test_golden.py breaks it"

UNBROKEN = {
    "test_packing_gives_the_golden_vectors": GOLDEN,
    "test_tiles_give_the_golden_vectors": GOLDEN,
    "test_a_transformer_is_quantized_saved_and_loaded": CORE,
    "test_a_transformer_trains_as_the_dense_one": CORE,
    "test_peak_memory_on_cuda_is_tiles_and_activations": NO_DEVICE,
    "test_cuda_gives_the_tiles_of_the_cpu": NO_DEVICE,
    "test_vllm_gives_the_log_probabilities_of_transformers": NO_VLLM,
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
