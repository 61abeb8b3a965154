"""Match the tensors of the files with the parameters of a model, and stream their values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, WeightError
from modulora_core.models.conversion import Conversion, converted_shapes, plan_conversions
from modulora_core.models.skeleton import PACK_IN_PYTHON, load_dtypes, tied_names, without_optional
from modulora_core.models.store import is_finite
from modulora_core.progress import Progress, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modulora_core.models.store import TensorStore

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter or persistent buffer as it is in memory."""

    shape: Shape
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Weights:
    """The tensors of a store as the parameters of a model.

    A conversion makes values of the tensors in the files, under names of its own. A parameter has
    another name than its value only if it is tied, and the files have its other name.

    Args:
        dtype: the dtype that the model is loaded in; transformers keeps some modules in fp32.
        transforms: transformers' weight transforms, if they differ from the transforms of the
            class. Tensors are then cast after them instead of before, as transformers does.

    Attributes:
        unplaced: the tensors in the files that the model has no place for.
        parameters: every parameter and persistent buffer in the files, by its name in memory, in
            the model's order, known from headers alone. Of tied names only the first is listed.
    """

    def __init__(
        self,
        store: TensorStore,
        model: PreTrainedModel,
        dtype: torch.dtype,
        transforms: list[Any] | None = None,
    ) -> None:
        self.store, self._model = store, model
        self._cast_first = transforms is None
        self._dtypes = load_dtypes(model, dtype)
        self._ties = tied_names(model)
        conversions, self.unplaced = plan_conversions(model, store.tensors, transforms)
        self._shapes: dict[str, Shape] = {}
        self._conversion_of: dict[str, Conversion] = {}
        self._conversions: list[tuple[Conversion, list[str]]] = []  # with the values of each
        for conversion in conversions:
            shapes = converted_shapes(model, conversion, store.tensors)
            made = [name for name in shapes if name in self._dtypes]
            self._shapes |= {name: shapes[name] for name in made}
            self._conversion_of |= dict.fromkeys(made, conversion)
            self._conversions.append((conversion, made))
        self._parameter_of = _parameters_of_values(self._shapes, self._ties)
        self._value_of = {parameter: value for value, parameter in self._parameter_of.items()}
        self.parameters: Mapping[str, ParameterInfo] = MappingProxyType(
            {
                parameter: ParameterInfo(self._shapes[value], self._dtypes[value])
                for parameter, value in self._value_of.items()
            }
        )

    def check_whole(self) -> None:
        """Compare the files' headers with the config. :attr:`unplaced` tensors are allowed.

        Raises CheckpointError: a parameter has no tensor in the files, or one of another shape.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        present = {*self._shapes, *self._value_of}
        missing = [n for n in shapes if n not in present and self._ties.get(n) not in present]
        missing = without_optional(self._model, missing)
        if missing:
            others = f"; {len(self.unplaced)} tensors have no place in it, such as "
            first = next(iter(self.unplaced), "")
            unplaced = f"{others}{first}; {PACK_IN_PYTHON}" if first else ""
            raise CheckpointError(
                f"{len(missing)} of {len(shapes)} parameters of {type(self._model).__name__} "
                f"aren't in the files, such as {', '.join(missing[:3])}"
                f"{unplaced}"
            )
        for name, found in self._shapes.items():
            if found != shapes[name]:
                raise CheckpointError(
                    f"{name}: expected {list(shapes[name])} by the config, got {list(found)}; "
                    "the weights don't belong to this config"
                )

    def ties_hold(self) -> bool:
        """Whether tied names have equal values; transformers unties them otherwise."""
        found = self._conversion_of
        return all(
            self._equal(found[name].names[0], found[source].names[0])
            for name, source in self._ties.items()
            if name in found and source in found
        )

    def _equal(self, one: str, other: str) -> bool:
        first, second = self.store.tensors[one], self.store.tensors[other]
        alike = (first.shape, first.stored_as) == (second.shape, second.stored_as)
        return alike and torch.equal(self.store.read(one), self.store.read(other))

    def checked_digest(self, progress: Progress = no_progress) -> str:
        """Read every value once, a tensor at a time: refuse NaN and Inf, and compute the digest.

        Args:
            progress: called as ``progress("checking", done, total)`` with bytes of the files.

        Returns:
            a SHA-256 of the values, as hexadecimal digits.

        Raises WeightError: a tensor has NaN or Inf; the message names it and its file.
        """
        used = [name for each in self.parameters for name in self.stored_names(each)]
        stored = {name: self.store.tensors[name] for name in used}
        done, total = 0, sum(tensor.nbytes for tensor in stored.values())
        digest = hashlib.sha256()
        for name, tensor in stored.items():
            values = self.store.read(name)
            content: Any = values.contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
            if not is_finite(values):
                raise WeightError(
                    f"{name} in {tensor.file}: expected finite values, got NaN or Inf; the file is "
                    "damaged, or the training that wrote it diverged"
                )
            done += tensor.nbytes
            progress("checking", done, total)
        return digest.hexdigest()

    def tensors(self, *, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Stream :attr:`parameters`, or ``names`` of them: names in memory, values on the CPU.

        A decoder layer comes together. One parameter exists at a time, if the caller drops it
        before the next. While tensors are fused or split, the parts and the whole exist together.

        Raises CheckpointError: a file was changed since it was opened.
        """
        asked = self.parameters if names is None else names
        for conversion, made in self._conversions:
            wanted = [name for name in made if self._parameter_of.get(name) in asked]
            converted = conversion.run(self._model, self._reader(conversion)) if wanted else {}
            for name in list(converted):
                if name not in wanted:
                    del converted[name]
                    continue
                yield self._parameter_of[name], converted.pop(name).to(self._dtypes[name])

    def convert(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Run a parameter's conversion on other contents of the files' tensors, from ``read``."""
        value = self._value_of[name]
        return self._conversion_of[value].run(self._model, read)[value]

    def stored_names(self, name: str) -> list[str]:
        """The names of the files' tensors that become a parameter."""
        return self._conversion_of[self._value_of[name]].names

    def _reader(self, conversion: Conversion) -> Callable[[str], Tensor]:
        dtype = self._dtypes[conversion.target]

        def read(name: str) -> Tensor:
            tensor = self.store.read(name)
            return tensor.to(dtype) if self._cast_first else tensor

        return read


def _parameters_of_values(values: Collection[str], ties: Mapping[str, str]) -> dict[str, str]:
    """The parameter of each value that the files have. Tied ones are a single parameter."""
    names: dict[str, str] = {}
    for value in values:
        parameter = ties.get(value, value)
        if parameter == value or not (parameter in values or parameter in names.values()):
            names[value] = parameter
    return names
