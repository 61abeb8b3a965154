"""Records the inputs of a model's linear weights: each matrix product of torch as it is called."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from modulora_core.models.sites import find_sites


class Products(TorchFunctionMode):
    """Within this mode, ``inputs[name, expert]`` lists the inputs of a linear weight of ``model``.

    A weight is known by the address where it begins; an expert's is a slice of its stack.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inputs: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self._at: dict[int, tuple[str, int]] = {}
        for site in find_sites(model).linears:
            parameter = model.get_parameter(site.name)
            for i, matrix in enumerate(parameter if site.experts else [parameter]):
                self._at[matrix.data_ptr()] = (site.name, i)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = weight = None
        if func is nn.functional.linear:
            x, weight = args[0], args[1]
        elif func is torch.addmm:  # GPT-2's Conv1D
            x, weight = args[1], args[2]
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm):
            x, weight = args
        known = isinstance(weight, Tensor) and weight.data_ptr() in self._at
        if known:
            name, i = self._at[weight.data_ptr()]
            if func is torch.bmm:  # all experts at once
                for expert, rows in enumerate(x):
                    self.inputs[name, expert].append(
                        rows.detach().double().reshape(-1, rows.shape[-1])
                    )
            else:
                self.inputs[name, i].append(x.detach().double().reshape(-1, x.shape[-1]))
        y = func(*args, **(kwargs or {}))
        if known:
            self.gave(name, i, y, stacked=func is torch.bmm)
        return y

    def gave(self, name: str, expert: int, y: Tensor, *, stacked: bool) -> None:
        """For subclasses: the result of a product, ``[experts, ...]`` if ``stacked``."""

    def hessian(self, name: str, expert: int = 0) -> Tensor:
        """E[xxᵀ] in fp64."""
        rows = torch.cat(self.inputs[name, expert])
        return rows.t() @ rows / len(rows)


def second_moments(model: PreTrainedModel, ids: Tensor) -> Products:
    """The inputs of the linear weights of a model on ``ids``."""
    seen = Products(model)
    with torch.no_grad(), seen:
        model(input_ids=ids, use_cache=False)
    return seen
