"""EXL3 tensors of a linear layer, and the weight that they mean, from the format's description.

Nothing here uses the plugin, or torch's random numbers, which may change between versions.
"""

import numpy as np
import torch

CODES = ("3inst", "mcg", "mul1")
BITS = range(1, 9)
HALVES = (1.5, 2.5, 3.5)
"""With the code mul1 alone."""

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}


def random_layer(shape, bits, code, *, seed=0, signs=False):
    """Random tensors of a layer ``[out, in]``, whose weights are about 1 / √in.

    Args:
        signs: store signs as bit fields (``su``, ``sv``), as older files do.
    """
    numbers = np.random.RandomState(seed)  # a stream that numpy never changes
    out, width = shape
    tiles = width // 16, out // 16, int(16 * bits)
    words = numbers.randint(-(2**15), 2**15, tiles, dtype=np.int16)
    tensors = {"trellis": torch.from_numpy(words)}
    for side, n, mean in (("u", width, width**-0.5), ("v", out, 1.0)):
        if signs:
            fields = numbers.randint(-(2**15), 2**15, n // 16, dtype=np.int16)
            tensors[f"s{side}"] = torch.from_numpy(fields)
        else:
            scales = mean * (0.5 + numbers.rand(n)) * numbers.choice([-1, 1], n)
            tensors[f"s{side}h"] = torch.from_numpy(scales.astype(np.float16))
    if code in MULTIPLIERS:
        tensors[code] = torch.from_numpy(np.array(MULTIPLIERS[code], np.uint32).view(np.int32))
    return tensors


def inner(tensors):
    """The decoded trellis, fp16 ``[in, out]``, in the rotated basis."""
    trellis = tensors["trellis"].numpy().view(np.uint16)
    rows, columns, words = trellis.shape
    size = 16 * words
    ordered = trellis.reshape(rows, columns, words // 2, 2)[..., ::-1]  # high halves first
    stream = np.unpackbits(np.ascontiguousarray(ordered.astype(">u2")).view(np.uint8))
    stream = stream.reshape(rows, columns, size)
    code = next((name for name in MULTIPLIERS if name in tensors), "3inst")
    W = np.empty((rows, 16, columns, 16), np.float16)
    for t in range(256):
        end = (t + 1) * words // 16  # rounded down: odd weights have the bit more
        places = (end - 16 + np.arange(16)) % size
        state = stream[..., places].astype(np.uint64) @ (1 << np.arange(15, -1, -1)).astype("u8")
        lane, i = divmod(t, 8)
        row, column = 2 * (lane % 4) + (i % 2) + 8 * (i % 4 // 2), lane // 4 + 8 * (i // 4)
        W[:, row, :, column] = value(state, code)
    return W.reshape(16 * rows, 16 * columns)


def value(state, code):
    """The number of each state."""
    if code == "mul1":
        x = (state * np.uint64(MULTIPLIERS["mul1"])).astype(np.uint32)
        total = sum(x >> np.uint32(8 * i) & np.uint32(255) for i in range(4))
        step, shift = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        return ((1024.0 + total) * step + shift).astype(np.float16)
    if code == "mcg":
        x = (state * np.uint64(MULTIPLIERS["mcg"])).astype(np.uint32)
    else:
        x = (state * np.uint64(89226354) + np.uint64(64248484)).astype(np.uint32)
    x = x & np.uint32(0x8FFF8FFF) ^ np.uint32(0x3B603B60)
    low, high = ((x >> np.uint32(n)).astype(np.uint16).view(np.float16) for n in (0, 16))
    return low + high


def weight(tensors):
    """The weight, fp64 ``[out, in]``."""
    H = np.ones((1, 1))
    while len(H) < 128:
        H = np.block([[H, H], [H, -H]])
    H /= 128**0.5
    W = inner(tensors).astype(np.float64)
    n, m = W.shape
    W = (H @ W.reshape(n // 128, 128, m)).reshape(n, m)
    W = (W.reshape(n, m // 128, 128) @ H).reshape(n, m)
    return torch.from_numpy((scales(tensors, "u")[:, None] * W * scales(tensors, "v")).T.copy())


def scales(tensors, side):
    """Scales of inputs (side ``"u"``) or outputs (``"v"``)."""
    if f"s{side}h" in tensors:
        return tensors[f"s{side}h"].numpy().astype(np.float64)
    fields = tensors[f"s{side}"].numpy().view(np.uint16)
    negative = fields[:, None] >> np.arange(16) & 1
    return 1.0 - 2.0 * negative.reshape(-1)
