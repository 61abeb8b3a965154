"""The random numbers of the whole process: torch's, numpy's and Python's, which belong to the user."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def unchanged_random_state(what: str) -> Iterator[None]:
    """Fail where the block seeds or draws from a global generator; ``what`` says what it does."""
    # one step on: where the same seed was set by an earlier call, setting it again would show no change
    torch.rand(1)
    random.random()
    np.random.random()
    before = _states()
    yield
    changed = [name for name, state in _states().items() if state != before[name]]
    assert not changed, (
        f"{what}: expected the global random state of {' and '.join(changed)} as it was, got another one; draw from a torch.Generator "
        "of your own"
    )


def _states() -> dict[str, object]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "random": random.getstate(),
    }
