"""QTIP in plain torch, as in the paper: the truth for packing.py and the kernels.

Symbols of QTIP (Tseng, Sun, Hou, De Sa 2024, arXiv 2406.11235):

    W, H      the weight, [M, N], and E[x xᵀ]; W̃ and H̃ in the rotated basis            section 2
    k, L      bits of a weight, and of a state; k may be a half more                section 2.3
    T         weights of a sequence, 256: a tile of T_x × T_y = 16 × 16                section 4
    s_t       the state of weight t, 0 ≤ s_t < 2^L; its value is C[s_t]             section 2.3
    C         the code: a function that computes values, no table                    section 3.1
    O         the overlap: L − k bits that the end of a walk shares with its start   section 3.3

A walk on the bitshift trellis goes from s to (s 2^k mod 2^L) + r, for any r < 2^k. So the first
L − k bits of s_t are the last L − k bits of s_{t−1}.

All is computed in fp64 if W is fp64, else in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from modulora_kernels import incoherence, rotation
from modulora_kernels.incoherence import Problem
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from modulora_qtip import SPEC, codes, trellis
from modulora_qtip.trellis import TILE

SCRATCH_BYTES = 256 * 2**20
"""For the errors of all walks of some sequences."""

SPARE_BITS = 6
"""Bits that a state has more than a weight, at least: kernels compare 64 walks at a time."""

WIDE = ("6.5", "7", "7.5", "8")
"""Bits that need larger states than the default; as words, since the command line has words."""

EXL3_STATES, EXL3_BLOCK, EXL3_CODES = 16, 128, ("3inst", "mcg", "mul1")
"""Of the layout ``exl3``: bits of a state, order of Hadamard matrices, code functions."""


EXL3_HALVES = (1.5, 2.5, 3.5)
"""The bits that ExLlamaV3 has besides whole ones, with the code mul1."""


def is_exl3_rate(bits: float, code: str) -> bool:
    """Whether ExLlamaV3 has so many bits of a weight with this code."""
    return bits == int(bits) or (bits in EXL3_HALVES and code == "mul1")


class Options(BaseModel):
    """How a weight is quantized. The defaults measured best (README, Quality)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bits: int | float = Field(  # pydantic would write an int as 2.0 if all were float
        2, ge=1, le=8, multiple_of=0.5, description="bits of a weight, 1 to 8 in steps of a half"
    )
    states: int = Field(
        12, ge=10, le=16, description="bits of a state: more are better, and slower to quantize"
    )
    code: Literal["bytes", "1mad", "3inst", "mcg", "mul1"] = Field(
        "bytes", description="the function that computes a state's value"
    )
    rescale: bool = Field(
        True, description="before rotating, even out the sizes of columns and of their inputs"
    )
    sweeps: int = Field(1, ge=0, le=100, description="rounds of coordinate descent after BlockLDLQ")
    damping: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of the mean of H's diagonal that is added to it; "
        "it grows if H can't be factorized",
    )
    codebook_scale: float | None = Field(
        None,
        gt=0.1,
        lt=10,
        description="root mean square of the rotated weights, in units of the code's deviation; "
        "by default 0.95, 0.92 with more than 2 bits, and 0.88 with more than 3",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the random signs")
    layout: Literal["full", "exl3"] = Field(
        "full",
        description="exl3: one that ExLlamaV3 reads, with 16 states, the code mul1 by default, "
        "and Hadamard matrices 128 wide",
    )

    @field_validator("bits")
    @classmethod
    def _whole(cls, bits: float) -> float:
        return bits if bits % 1 else int(bits)  # 2.0 would be other metadata than 2

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("layout") == "exl3":
            return {"states": EXL3_STATES, "code": "mul1", **data}
        if isinstance(data, Mapping) and str(data.get("bits")).removesuffix(".0") in WIDE:
            return {"states": math.ceil(float(data["bits"])) + SPARE_BITS, **data}
        return data

    @model_validator(mode="after")
    def _checked(self) -> Options:
        if self.layout == "exl3" and (self.states != EXL3_STATES or self.code not in EXL3_CODES):
            raise ValueError(
                f"layout exl3: expected states={EXL3_STATES} and a code, one of "
                f"{', '.join(EXL3_CODES)}, got states={self.states} and code={self.code}"
            )
        if self.layout == "exl3" and not is_exl3_rate(self.bits, self.code):
            raise ValueError(
                f"layout exl3: expected whole bits, or {', '.join(map(str, EXL3_HALVES))} with the "
                f"code mul1, got bits={self.bits} and code={self.code}"
            )
        least = math.ceil(self.bits) + SPARE_BITS
        if self.states < least:
            raise ValueError(
                f"states: expected at least bits + {SPARE_BITS} = {least}, got {self.states}"
            )
        return self

    @property
    def scale(self) -> float:
        """:attr:`codebook_scale`, or its default: with more bits the code's ends limit errors."""
        return self.codebook_scale or next(
            scale for most, scale in ((2, 0.95), (3, 0.92), (8, 0.88)) if self.bits <= most
        )

    @property
    def block(self) -> int | None:
        """The order of the Hadamard matrices, or None for the dimension's."""
        return EXL3_BLOCK if self.layout == "exl3" else None


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight: Ŵ = scale · diag(svh) H_M C H_Nᵀ diag(suh), its first M rows and N
    columns.

    Attributes:
        trellis: int16 ``[⌈N/16⌉, ⌈M/16⌉, 16 bits]``; decoded it is C.
        suh: fp16 ``[N]``: S_U, divided by the rescaling s.
        svh: fp16 ``[M]``: S_V.
        scale: fp32 ``[1]``: one unit of the code.
    """

    trellis: Tensor
    suh: Tensor
    svh: Tensor
    scale: Tensor

    def dequantize(self, options: Options) -> Tensor:
        """Ŵ, fp64 ``[M, N]``, by dense matrices."""
        M, N = len(self.svh), len(self.suh)
        H_M, H_N = (rotation.matrix(n, options.block) for n in (M, N))
        C = trellis.decode(self.trellis, options.bits, options.states, options.code)
        S_V, S_U = self.svh.double()[:, None], self.suh.double()
        return self.scale.double() * S_V * (H_M @ C[:M, :N].double() @ H_N.T) * S_U


def prepare(
    weight: Tensor, hessian: Tensor, options: Options, output_hessian: Tensor | None = None
) -> Problem:
    """Incoherence processing (section 2.1): W̃ in units of the code, and H̃.

    Args and Raises: as :func:`modulora_kernels.incoherence.prepare`.
    """
    return incoherence.prepare(
        SPEC.name,
        weight,
        hessian,
        output_hessian,
        rms=options.scale * codes.CODES[options.code].deviation,
        multiples=(TILE, TILE),
        damping=options.damping,
        rescale=options.rescale,
        seed=options.seed,
        block=options.block,
    )


def viterbi(w: Tensor, C: Tensor, bits: float, overlap: Tensor | None = None) -> Tensor:
    """The walks with the least squared error (section 2.3): states, int64 ``[n, T]``.

    Args:
        w: sequences, ``[n, T]``.
        C: the values of all states, ``[2^L]``.
        bits: of a weight; with halves, k_t is less for even t, and T is even.
        overlap: int64 ``[n]``, L − k_0 bits with which each walk begins and ends; None for any.
    """
    n, length = w.shape
    s = torch.arange(len(C), device=w.device)
    k = [trellis.new_bits(bits)[t % 2] for t in range(length + 1)]
    # E[u], the least error of a walk so far whose last state ends in the L − k_t bits of u
    E = w.new_zeros(n, len(C) >> k[0])
    if overlap is not None:
        E.fill_(torch.inf).scatter_(1, overlap[:, None], 0)
    choices = []
    for t in range(length):
        errors = E[:, s >> k[t]] + (w[:, t, None] - C).square()  # of walks that end in s, [n, 2^L]
        # states that end in u differ in their first bits
        E, choice = errors.unflatten(1, (-1, len(C) >> k[t + 1])).min(dim=1)
        choices.append(choice.to(torch.uint8))
    u = E.argmin(dim=1) if overlap is None else overlap
    walk = []
    for t in reversed(range(length)):
        state = choices[t].gather(1, u[:, None])[:, 0].long() * (len(C) >> k[t + 1]) + u
        walk.append(state)
        u = state >> k[t]
    return torch.stack(walk[::-1], dim=1)


def tail_biting(w: Tensor, C: Tensor, bits: float) -> Tensor:
    """Circular walks (algorithm 4): states ``[n, T]`` whose end overlaps their start.

    The walk of the sequence rotated by T/2 passes the seam in its middle. Its overlap there is
    then required of the start and the end.
    """
    half = w.shape[1] // 2
    rotated = viterbi(w.roll(half, dims=1), C, bits)
    overlap = rotated[:, half - 1] & ((len(C) >> trellis.new_bits(bits)[0]) - 1)
    return viterbi(w, C, bits, overlap)


def quantize(x: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Q of ``x``, ``[M, 16 n]``: its bit strings, ``[n, M / 16, 16 bits]``, and its values."""
    C = codes.table(options.code, options.states, x.device)
    sequences = trellis.to_sequences(x)
    rows = max(1, SCRATCH_BYTES // (4 * x.element_size() * len(C)))
    flat = sequences.flatten(0, 1).split(rows)
    walks = torch.cat([tail_biting(w, C.to(x), options.bits) for w in flat])
    walks = walks.view(sequences.shape)
    return trellis.pack(walks, options.bits), trellis.from_sequences(C.to(x)[walks])


def solve(weight: Tensor, hessian: Tensor, options: Options) -> Solution:
    """Quantize ``weight`` by BlockLDLQ (algorithm 5), then by rounds of coordinate descent.

    Args and Raises: as :func:`prepare`.
    """
    problem = prepare(weight, hessian, options)
    W, H = problem.W, problem.H
    blocks = range(W.shape[1] - TILE, -1, -TILE)  # the last first
    L, W_hat = incoherence.feedback(SPEC.name, H, TILE, options.damping), W.clone()
    strings = {}
    for k in blocks:
        here, after = slice(k, k + TILE), slice(k + TILE, None)
        target = W[:, here] + (W - W_hat)[:, after] @ L[after, here]
        strings[k], W_hat[:, here] = quantize(target, options)
    for _ in range(options.sweeps):
        for k in blocks:
            here = slice(k, k + TILE)
            E = (W - W_hat) @ H[:, here]
            target = W_hat[:, here] + torch.linalg.solve(H[here, here], E, left=False)
            strings[k], W_hat[:, here] = quantize(target, options)
    packed = torch.cat([strings[k] for k in reversed(blocks)])
    return Solution(packed, problem.input_scale, problem.output_scale, problem.scale)
