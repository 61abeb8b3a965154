"""The fake device of the kit: it gives the CPU's values, and refuses what a GPU refuses."""

import numpy as np
import pytest
import torch
from modulora_conformance.fake_device import CUDA, OnCuda, fake_cuda, moved

from modulora_core.tiles import tile_budget, tiled_matmul

TABLE = torch.arange(8.0)

MOVES = {
    "to(device)": lambda t, x: t.to(x.device),
    "to(tensor)": lambda t, x: t.to(x),
    "cuda()": lambda t, x: t.cuda(),
    "new_tensor": lambda t, x: x.new_tensor(t.tolist()),
    "copy_": lambda t, x: torch.empty(8, device=x.device).copy_(t),
    "as_tensor(device=)": lambda t, x: torch.as_tensor(t.tolist(), device=x.device),
    "from numpy": lambda t, x: torch.from_numpy(np.arange(8, dtype=np.float32)).to(x.device),
    "a device context": lambda t, x: made_in(x.device),
    "a buffer of a module": lambda t, x: module_with(t).to(x.device).table,
}


def made_in(device):
    with torch.device(device):
        return torch.arange(8.0)


def module_with(table):
    module = torch.nn.Module()
    module.register_buffer("table", table)
    return module


@pytest.mark.parametrize("move", MOVES)
def test_a_table_of_the_cpu_that_is_moved_is_used(move):
    """If this fails: a sound quantizer with such a line fails the checks of another device."""
    with fake_cuda():
        x = moved(torch.full((8,), 3.0))
        table = MOVES[move](TABLE, x)
        assert table.device == CUDA == x.device == torch.device("cuda:0")
        found = x * table
        picked = table[moved(torch.tensor([7, 0]))]
    assert isinstance(found, OnCuda)
    assert torch.equal(found.on_cpu, 3 * TABLE)
    assert torch.equal(picked.on_cpu, torch.tensor([7.0, 0.0]))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x * TABLE,
        lambda x: torch.where(x > 0, x, TABLE),
        lambda x: torch.cat([x, TABLE]),
        lambda x: TABLE[x.long()],
        lambda x: TABLE @ x,
        lambda x: torch.bucketize(x, TABLE),
    ],
)
def test_a_table_that_stays_on_the_cpu_is_an_error(mix):
    """If this fails: a quantizer is certified that stops at the first product on a GPU."""
    with fake_cuda(), pytest.raises(RuntimeError, match="expected all tensors on one device"):
        mix(moved(TABLE))


def test_random_numbers_need_a_generator_of_their_device():
    with fake_cuda():
        x = moved(TABLE)
        draw = torch.Generator(device=x.device).manual_seed(3)
        assert isinstance(draw, torch.Generator)
        assert draw.device == CUDA
        drawn = torch.randn(4, generator=draw, device=draw.device)
        moved_later = torch.randn(4, generator=torch.Generator().manual_seed(3)).to(x.device)
        with pytest.raises(RuntimeError, match="generator on cuda"):
            torch.randn(4, generator=torch.Generator(), device=x.device)
        with pytest.raises(RuntimeError, match="generator on cuda"):
            x.normal_(generator=torch.Generator())
        with pytest.raises(RuntimeError, match="generator on cpu"):
            torch.randn(4, generator=draw)
    assert torch.equal(drawn.on_cpu, moved_later.on_cpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_partial_sum_of_tiles_may_exceed_fp16(dtype):
    """Row 0 adds 80,000 to each output, which fp16 can't hold, and row 1 takes 79,990 away."""
    W = torch.tensor([[256.0, 128.0], [-255.5, -127.0]])
    y = torch.tensor([[320.0, 320.0]])
    with fake_cuda(), tile_budget(4):  # one row
        x = tiled_matmul(moved(y.to(dtype)), lambda a, b, of: moved(W[a:b]).to(of), (2, 2), True)
    expected = (y @ W.to(dtype).float()).to(dtype)
    assert torch.equal(x.on_cpu, expected)
    assert expected.isfinite().all()
