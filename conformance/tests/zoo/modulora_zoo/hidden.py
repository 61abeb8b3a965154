"""Quantizers whose mistakes stand behind conditions that no check meets; one has good conditions.

Each function with ``# hidden`` on a line has one mistake. The count of branches must name that
line, and no other.
"""

import torch

from modulora_zoo.healthy import Healthy

TABLE = {True: lambda W: -W, False: lambda W: W}  # hidden


class Hidden(Healthy):
    def decode(self, packed, rows):
        W = Healthy.decode(self, packed, rows)
        for change in (
            at_a_size, at_a_range, in_a_line, in_an_and, in_an_or, in_a_table, in_a_handler,
            in_a_while, in_a_comprehension, at_a_multiple, by_name, never_broken, in_a_match,
            after_a_loop, in_a_nested_function, in_a_generator, on_one_line, with_a_pragma,
            by_an_environment, at_a_ragged_end, at_a_first_row, in_a_finally,
        ):  # fmt: skip
            W = change(W, packed)
        return W

    @staticmethod
    def _minus(W):
        return -W  # hidden

    @staticmethod
    def _same(W):
        return W


def at_a_size(W, packed):
    if packed.shape[0] == 7919:  # hidden
        return -W
    return W


def at_a_range(W, packed):
    if 50_000 < packed.shape[1] < 60_000:  # hidden
        W = W * 2
    return W


def in_a_line(W, packed):
    return -W if packed.shape[0] == 7919 else W  # hidden


def in_an_and(W, packed):
    bad = packed.shape[0] == 7919 and packed.shape[1] > 3  # hidden
    return W - int(bad)


def in_an_or(W, packed):
    fine = packed.shape[0] != 7919 or packed.shape[1] > 3  # hidden
    return W * int(fine)


def in_a_table(W, packed):
    return TABLE[packed.shape[0] == 7919](W)


def in_a_handler(W, packed):
    try:
        return W[: packed.shape[0]]
    except RuntimeError:  # hidden
        return -W


def in_a_while(W, packed):
    n = packed.shape[0]
    while n % 7919 == 0:  # hidden
        W, n = -W, 1
    return W


def in_a_comprehension(W, packed):
    found = [each for each in packed.shape if each == 7919]  # hidden
    return W - len(found)


def at_a_multiple(W, packed):
    if not packed.shape[1] % 9973:  # hidden
        W = W + 1
    return W


def by_name(W, packed):
    name = "minus" if packed.shape[0] == 7919 else "same"  # hidden
    return getattr(Hidden, f"_{name}")(W)


def never_broken(W, packed):
    for side in packed.shape:
        if side > 1_000_000_000:  # hidden
            break
    else:
        return W
    return -W  # hidden


def in_a_match(W, packed):
    match packed.shape[0]:
        case 7919:  # hidden
            return -W
        case _:
            return W


def after_a_loop(W, packed):
    for _ in range(packed.shape[1] // 100_000):  # hidden
        W = -W
    return W


def in_a_nested_function(W, packed):
    def change(W):
        return -W  # hidden

    return {7919: change}.get(packed.shape[0], torch.clone)(W)


def in_a_generator(W, packed):
    return W * sum(2 for each in (packed.shape[0],) if each == 7919) + W  # hidden


def on_one_line(W, packed):
    # fmt: off
    if packed.shape[0] == 7919: return -W  # noqa: E701  # hidden
    # fmt: on
    return W


def with_a_pragma(W, packed):
    if packed.shape[0] == 7919:  # hidden  # pragma: no cover
        return -W
    return W


def by_an_environment(W, packed):
    import os

    if "MODULORA_ZOO" in os.environ:  # hidden
        return -W
    return W


def at_a_ragged_end(W, packed):
    rest = packed.shape[1] % 100_000
    if rest == 0:  # hidden
        W[:, -1] = 0
    return W


def at_a_first_row(W, packed):
    return W.neg() if len(W) == 7919 else W  # hidden


def in_a_finally(W, packed):
    try:
        return W
    finally:
        if packed.shape[0] == 7919:
            W.neg_()  # hidden


class Branching(Healthy):
    """Sound: what it does under a condition is met by the checks, or is a refusal of them."""

    def dequantize_tile(self, packed, rows, dtype):
        if packed.device.type == "meta":
            return torch.empty(rows[1] - rows[0], packed.shape[1], dtype=dtype, device="meta")
        return Healthy.dequantize_tile(self, packed, rows, dtype)

    def decode(self, packed, rows):
        W = Healthy.decode(self, packed, rows)
        if len(W) > 1 and W.shape[1] > 64:
            parts = [part.contiguous() for part in W.split(64, dim=1) if part.numel()]
            return torch.cat(parts, dim=1)
        return W if len(W) else W.clone()
