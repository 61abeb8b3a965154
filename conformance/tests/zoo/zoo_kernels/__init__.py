"""Quantizers for the tests of ``compiled_kernels``: a sound one, and some broken where compiled kernels break. Metadata only, no torch."""

from __future__ import annotations

from modulora_core.hookspecs import hookimpl
from modulora_core.spec import QuantizerSpec

BREAKS = {
    "ReadsBeyond": "test_kernels_read_nothing_beyond_the_last_byte",
    "OtherOnOldProcessors": "test_other_instruction_sets_give_the_same_values",
    "WantsAlignment": "test_tensors_that_are_mapped_from_a_file_are_read",
    "OneBuffer": "test_several_python_threads_get_what_one_gets",
    "SumsByThread": "test_products_do_not_depend_on_the_number_of_threads",
    "SilentWithoutNumba": "test_without_numba_everything_works_after_one_warning",
    "HeavyPackage": "test_the_hook_imports_neither_torch_nor_numba",
    "PacksInCopies": "test_packing_a_large_weight_takes_little_memory",
}
"""The test that each fails."""


def _spec(cls: str) -> QuantizerSpec:
    return QuantizerSpec(
        name="zoo-kernels-" + cls.lower(),
        summary=f"for the kit's own tests: {cls}",
        location=f"zoo_kernels_heavy:{cls}"
        if cls == "HeavyPackage"
        else f"zoo_kernels.quantizers:{cls}",
        protocol=1,
        bits=(4,),
        in_multiple=2,
    )


SPECS = {cls: _spec(cls) for cls in ("Sound", *BREAKS)}


@hookimpl
def modulora_quantizers() -> list[QuantizerSpec]:
    return list(SPECS.values())
