"""The parameters of a model: which tensors of the files they come from, and the stream of their values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modulora_core.errors import CheckpointError, WeightError
from modulora_core.kernels import one_thread
from modulora_core.models import conversion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modulora_core.models.conversion import Conversion
    from modulora_core.models.store import TensorStore

Progress = Callable[[int, int], None]
"""Called with the bytes of the files done so far, and all that there are to do."""


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter or persistent buffer as it is in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Weights:
    """The tensors of a store as the parameters of a model.

    Args:
        store: the tensors in the files.
        model: the model on the meta device.
        dtype: what the model is loaded in; transformers keeps some modules in fp32 all the same.
        transforms: transformers' weight transforms, where they aren't those of the model's class. Tensors are
            then cast after them instead of before, as transformers does.

    Attributes:
        parameters: every parameter and persistent buffer that :meth:`stream` gives, in its order.
    """

    def __init__(
        self,
        store: TensorStore,
        model: PreTrainedModel,
        dtype: torch.dtype,
        transforms: list[Any] | None = None,
    ) -> None:
        self._store, self._model = store, model
        self._cast_first = transforms is None
        self._dtypes = conversion.load_dtypes(model, dtype)
        self._plan = conversion.plan_conversions(model, store.tensors, transforms)
        self._shapes = {
            found.target: conversion.converted_shapes(model, found, store.tensors)
            for found in self._plan.conversions
        }
        self._from = {
            name: found
            for found in self._plan.conversions
            for name in self._shapes[found.target]
            if name in self._dtypes
        }
        self._renamed = self._tied()
        self._used = [
            found
            for found in self._plan.conversions
            if any(map(self._kept, self._shapes[found.target]))
        ]
        self.parameters: Mapping[str, ParameterInfo] = MappingProxyType(dict(self._parameters()))

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Tensors of the files that the model has no place for."""
        return self._plan.unexpected

    @property
    def nbytes(self) -> int:
        """Bytes of the files that :meth:`stream` and :meth:`check_finite` read."""
        return sum(self._stored_bytes(found) for found in self._used)

    def tied_but_different(self) -> list[str]:
        """Names that the config ties to another while the files hold both, with other values.

        transformers then leaves them apart.
        """
        ties = conversion.tied_names(self._model).items()
        both = [
            (name, source) for name, source in ties if name in self._from and source in self._from
        ]
        return [
            name for name, source in both if not self._equal(self._from[name], self._from[source])
        ]

    def check(self) -> None:
        """Compare with what the config says.

        Raises:
            CheckpointError: a parameter has no tensor in the files, or one of another shape.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        missing = self._missing(shapes)
        if missing:
            unexpected = self.unexpected
            other = (
                f"; {len(unexpected)} tensors have no place in it, such as {unexpected[0]}"
                if unexpected
                else ""
            )
            raise CheckpointError(
                f"{len(missing)} of {len(shapes)} parameters of {type(self._model).__name__}, as the config "
                f"describes it, aren't in the files, such as {', '.join(missing[:3])}{other}"
            )
        found = {
            name: shape for converted in self._shapes.values() for name, shape in converted.items()
        }
        wrong = [
            f"{name}: expected {list(expected)} by the config, got {list(found[name])}"
            for name, expected in shapes.items()
            if found.get(name, expected) != expected
        ]
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{'; '.join(wrong[:3])}{more}; the weights don't belong to this config"
            )

    def check_finite(self, progress: Progress | None = None) -> str:
        """Read every value once, a few MiB at a time.

        Returns:
            a SHA-256 of the values, as hexadecimal digits.

        Raises:
            WeightError: a tensor has NaN or Inf; the message names it and its file.
        """
        done, total = 0, self.nbytes
        digest = hashlib.sha256()
        for name in (name for found in self._used for name in found.names):
            # between reads the threads of a pool fall asleep, and waking them takes longer than a chunk does: 939 MB
            # of bf16 took 1.1 s with two threads on 2 shared cores, 0.2 s with one
            with one_thread():
                finite = all(_finite(chunk, digest) for chunk in self._store.chunks(name))
            if not finite:
                raise WeightError(
                    f"{name} in {self._store.tensors[name].file}: expected finite values, got NaN or Inf; "
                    f"the file is damaged, or the training that wrote it diverged"
                )
            done += self._store.tensors[name].nbytes
            if progress is not None:
                progress(done, total)
        return digest.hexdigest()

    def stream(
        self, progress: Progress | None = None, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its name in memory, in the model's order: a decoder layer comes together.

        Only the parameters of one conversion exist at a time: usually one, or those that one tensor of the
        file is split into. While experts are fused, the parts and the whole exist together.

        Raises:
            CheckpointError: a file ends too early, or a tensor has another shape than :meth:`check` saw.
        """
        wanted = [found for found in self._used if names is None or self._gives(found, names)]
        done, total = 0, sum(self._stored_bytes(found) for found in wanted)
        for found in wanted:
            converted = found.run(self._model, self._reader(found))
            for name in list(converted):
                if not self._kept(name) or not (names is None or self._public(name) in names):
                    del converted[name]
                    continue
                self._check_shape(
                    name, tuple(converted[name].shape), self._shapes[found.target][name]
                )
                yield self._public(name), converted.pop(name).to(self._dtypes[name])
            done += self._stored_bytes(found)
            if progress is not None:
                progress(done, total)

    def _parameters(self) -> Iterator[tuple[str, ParameterInfo]]:
        for used in self._used:
            for name, shape in self._shapes[used.target].items():
                if self._kept(name):
                    yield self._public(name), ParameterInfo(shape, self._dtypes[name])

    def _missing(self, names: Iterable[str]) -> list[str]:
        """Those of the model's names that are neither in the files, nor tied to one that is, nor optional."""
        present = set(self._from) | set(self._renamed.values())
        present |= {
            name for name, source in conversion.tied_names(self._model).items() if source in present
        }
        missing = [name for name in names if name not in present]
        optional = conversion.optional_names(self._model, missing)
        return [name for name in missing if name not in optional]

    def _reader(self, found: Conversion) -> Callable[[str], Tensor]:
        dtype = self._dtypes[found.target]

        def read(name: str) -> Tensor:
            tensor = self._store.read(name)
            return tensor.to(dtype) if self._cast_first else tensor

        return read

    def _tied(self) -> dict[str, str | None]:
        """``{name: its name in the stream}``: None if the name it is tied to is there, else that name."""
        renamed: dict[str, str | None] = {}
        for name, source in conversion.tied_names(self._model).items():
            if name in self._from:
                renamed[name] = (
                    None if source in self._from or source in renamed.values() else source
                )
        return renamed

    def _kept(self, name: str) -> bool:
        return name in self._dtypes and self._renamed.get(name, name) is not None

    def _public(self, name: str) -> str:
        """The name in the stream."""
        return self._renamed.get(name) or name

    def _gives(self, found: Conversion, names: Collection[str]) -> bool:
        return any(
            self._kept(name) and self._public(name) in names for name in self._shapes[found.target]
        )

    def _equal(self, one: Conversion, other: Conversion) -> bool:
        a, b = one.names[0], other.names[0]
        first, second = self._store.tensors[a], self._store.tensors[b]
        if (first.shape, first.stored_as) != (second.shape, second.stored_as):
            return False
        pairs = zip(self._store.chunks(a), self._store.chunks(b), strict=True)
        return all(torch.equal(x, y) for x, y in pairs)

    def _stored_bytes(self, found: Conversion) -> int:
        return sum(self._store.tensors[name].nbytes for name in found.names)

    @staticmethod
    def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise CheckpointError(
                f"{name}: expected shape {list(expected)} by the files' headers, got {list(shape)}"
            )


def _finite(chunk: Tensor, digest: Any) -> bool:
    """Whether all values are finite: aminmax gives NaN when any value is NaN. Their bytes go into ``digest``."""
    digest.update(chunk.contiguous().reshape(-1).view(torch.uint8).numpy())
    if not chunk.is_floating_point() or chunk.numel() == 0:
        return True
    if chunk.dtype.itemsize == 1:  # 8-bit floats have no arithmetic of their own
        chunk = chunk.to(torch.float32)
    low, high = torch.aminmax(chunk)
    return bool(torch.isfinite(low) & torch.isfinite(high))
