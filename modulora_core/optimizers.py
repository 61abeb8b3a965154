"""How the adapter's parameters are stepped, and where the optimizer's states are meanwhile.

AdamW keeps two moments for each trained value. What may be done about that, and about gradients that all wait for one step:

    a byte for each      two bytes instead of eight for a value, by bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861)
    offloaded            they wait elsewhere (:mod:`modulora_core.offload`); one parameter's are there at a time
    at once              a parameter is stepped in the backward as soon as its gradient is there, and the gradient is dropped
                         (as in LOMO, Lv et al. 2023, arXiv 2306.09782, but with the optimizer's own rule)

All three are about *when* and *where*, so they take any optimizer of torch's interface, and its state dict stays what it is: a run
is resumed as any other. Stepping parameters one by one is the same arithmetic as stepping them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.training_args import OptimizerNames

from modulora_core.errors import MissingExtraError
from modulora_core.offload import Place

TRANSFORMERS_NAMES: Mapping[str, OptimizerNames] = {
    "adamw": OptimizerNames.ADAMW_TORCH,
    "adamw-8bit": OptimizerNames.ADAMW_BNB,
}
"""Our names of optimizers, and those of transformers."""

_SMALLEST_STATE = 4096
"""Bytes: one page. Steps and code books are smaller, and are shared among parameters."""


def check_optimizer(name: str) -> None:
    """Refuse an optimizer whose library isn't there.

    Raises:
        MissingExtraError: bitsandbytes isn't installed.
    """
    if name == "adamw-8bit" and find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "optimizer adamw-8bit needs the library bitsandbytes, which is missing; "
            "pip install 'modulora-core[optimizers]'"
        )


def step_one_by_one(optimizer: torch.optim.Optimizer, place: Place | None, *, at_once: bool) -> None:
    """Change ``optimizer`` so that its parameters are stepped one after another.

    Args:
        optimizer: of any kind that leaves parameters without a gradient alone.
        place: where the states wait between the steps; None leaves them where they are.
        at_once: a parameter is stepped in the backward, as soon as its gradient is whole, and the gradient is dropped. Then
            ``optimizer.step()`` finds nothing to do. There must be one backward for each step, and nothing may
            look at gradients between the two.
    """
    whole_step = optimizer.step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step_one(parameter: Tensor) -> None:
        """Step the one parameter that has a gradient."""
        if place is not None:
            _bring(optimizer, parameter)
        whole_step()
        parameter.grad = None
        if place is not None:
            _keep(optimizer, parameter, place)

    def step(_: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in gradients:
            parameter.grad = None
        for parameter, gradient in gradients:
            parameter.grad = gradient
            step_one(parameter)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    if at_once:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(step_one)
    if place is not None:
        optimizer.register_load_state_dict_post_hook(partial(_keep_all, parameters, place))


def _bring(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """The states of ``parameter`` to its device: on a CPU they are used in place."""
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if _is_large(value):
            state[name] = value.to(parameter.device)


def _keep(optimizer: torch.optim.Optimizer, parameter: Tensor, place: Place) -> None:
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if _is_large(value):
            state[name] = place.keep(value)


def _keep_all(parameters: list[Tensor], place: Place, optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters:
        _keep(optimizer, parameter, place)


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() * value.element_size() >= _SMALLEST_STATE
