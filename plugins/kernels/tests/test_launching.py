"""Tensors become arrays, tiles are filled, malformed weights are refused, memory is reused."""

import os
import subprocess
import sys

import modulora_kernels as kernels
import pytest
import torch
from modulora_kernels.launching import array_of

from modulora_core.errors import CheckpointError
from modulora_core.packed import PackedWeight, TensorLayout

pytest.importorskip("numba")


def outsiders_tensors(shape, size):
    if size < 1:
        raise ValueError(f"size: expected 1 or more, got {size}")
    return {
        "codes": TensorLayout("uint8", shape),
        "scales": TensorLayout("float32", (shape[0] // size,)),
    }


def outsiders(codes, scales, **metadata):
    return PackedWeight("outsider", 1, (4, 6), {"codes": codes, "scales": scales}, metadata)


CODES, SCALES = torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(2)


def test_tensors_that_match_the_metadata_are_let_through_until_they_change():
    packed = outsiders(CODES, SCALES.clone(), size=2)
    kernels.check_tensors(packed, outsiders_tensors)
    kernels.check_tensors(packed, outsiders_tensors)
    packed.tensors["scales"].data = torch.zeros(1)
    with pytest.raises(CheckpointError, match="expected scales"):
        kernels.check_tensors(packed, outsiders_tensors)


@pytest.mark.parametrize(
    ("packed", "message"),
    [(outsiders(CODES, SCALES, size=1), r"scales as float32 \[4\], got float32 \[2\]"),
     (outsiders(CODES.int(), SCALES, size=2), r"codes as uint8 \[4, 6\], got int32 \[4, 6\]"),
     (PackedWeight("outsider", 1, (4, 6), {"codes": CODES}, {"size": 2}), r"scales .* got none"),
     (PackedWeight("outsider", 1, (4, 6), {"codes": CODES, "scales": SCALES, "more": SCALES},
                   {"size": 2}), r"expected more as none, got float32 \[2\]"),
     (outsiders(CODES, SCALES, size=0), "size: expected 1 or more, got 0"),
     (outsiders(CODES, SCALES), "expected values of size"),
     (outsiders(CODES, SCALES, size=2, more=1), "expected values of size, got .*'more': 1")],
    ids=["shape", "dtype", "missing", "more", "value", "no metadata", "more metadata"],
)  # fmt: skip
def test_tensors_that_do_not_match_the_metadata_are_refused(packed, message):
    with pytest.raises(CheckpointError, match=message):
        kernels.check_tensors(packed, outsiders_tensors)


class Made:
    """``make``, and how often it was asked."""

    def __init__(self):
        self.times = 0

    def __call__(self, packed):
        self.times += 1
        return packed.tensors["codes"].view(-1), packed.metadata["size"]


def weight(codes):
    return PackedWeight("outsider", 1, (2, 4), {"codes": codes}, {"size": 3})


def test_operands_are_made_once_and_follow_changes():
    """If this fails: a kernel reads the weight of before."""
    codes, make, other = torch.arange(8.0).view(2, 4), Made(), Made()
    packed = weight(codes)
    first, second = kernels.operands(packed, make), kernels.operands(packed, make)
    assert first is second
    assert first[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert first[1] == 3
    codes.mul_(2)
    assert kernels.operands(packed, make)[0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    kernels.operands(packed, other)
    assert (make.times, other.times) == (1, 1)
    codes.data = torch.ones(2, 4)
    assert kernels.operands(packed, make)[0].tolist() == 8 * [1]
    assert make.times == 2


def test_an_unaligned_tensor_is_copied_and_its_copy_is_not_cached():
    """safetensors promises no alignment, and numba would compile another kernel for it."""
    raw = bytearray(b"." + torch.arange(8.0).numpy().tobytes())
    packed, make = weight(torch.frombuffer(raw, dtype=torch.float32, offset=1).view(2, 4)), Made()
    for _ in range(2):
        array, _ = kernels.operands(packed, make)
        assert array.flags.aligned
        assert array.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert make.times == 2


def test_an_array_lets_its_tensor_free_the_memory():
    """FSDP2 frees a gathered parameter: it resizes the storage, which ``numpy()`` forbids."""
    tensor = torch.arange(6.0).view(2, 3)
    turned = array_of(tensor.t())
    assert turned.tolist() == tensor.t().tolist()
    assert turned.strides == (4, 12)
    assert array_of(torch.empty(0, 3)).shape == (0, 3)
    tensor.untyped_storage().resize_(0)


FORKED = """
import os, torch
import modulora_kernels as kernels
from modulora_core.errors import WorkError

kernels.launch(lambda out: None, torch.empty(1))
child = os.fork()
if child == 0:
    try:
        kernels.launch(lambda out: None, torch.empty(1))
    except WorkError as error:
        os._exit(7 if "multiprocessing_context='spawn'" in str(error) else 8)
    os._exit(9)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_of_a_process_that_has_run_kernels_is_refused():
    """If this fails: OpenMP ends or hangs the workers of a DataLoader that use the model."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True)
    assert done.returncode == 7, done.stderr
