"""Records the inputs of a model's linear weights: each matrix product of torch as it is called."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modulora_core.models.sites import find_sites


class Products(TorchFunctionMode):
    """Within this mode, ``inputs[name, expert]`` lists the inputs of a linear weight of ``model``.

    A weight is known by the address where it begins; an expert's is a slice of its stack.
    """

    def __init__(self, model):
        super().__init__()
        self.inputs = defaultdict(list)
        self._at = {}
        for site in find_sites(model).linears:
            parameter = model.get_parameter(site.name)
            for i, matrix in enumerate(parameter if site.experts else [parameter]):
                self._at[matrix.data_ptr()] = (site.name, i)

    def __torch_function__(self, func, types, args=(), kwargs=None):
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

    def gave(self, name, expert, y, *, stacked):
        """For subclasses: the result of a product, ``[experts, ...]`` if ``stacked``."""

    def hessian(self, name, expert=0):
        """E[xxᵀ] in fp64."""
        rows = torch.cat(self.inputs[name, expert])
        return rows.t() @ rows / len(rows)


def second_moments(model, ids):
    """The inputs of the linear weights of a model on ``ids``."""
    seen = Products(model)
    with torch.no_grad(), seen:
        model(input_ids=ids, use_cache=False)
    return seen
