"""The exceptions of this package.

A message says the subject, the expected value, the value, and what to do, in one line.
"""

from __future__ import annotations

import re


class ModuLoRAError(Exception):
    """The root of the tree. ``exit_code`` is what the command line ends with."""

    exit_code = 1
    agreed = False
    """Whether all processes of a distributed run know this error."""

    def __init__(self, message: str = "") -> None:
        # a library's text in it may have several lines
        super().__init__(" ".join(map(str.strip, message.splitlines())))

    @property
    def kind(self) -> str:
        """The class's name, as ``--json`` prints it."""
        return type(self).__name__


class RequestError(ModuLoRAError):
    """The request was wrong; said before any work."""

    exit_code = 2


class OptionError(RequestError):
    """An unknown or ill-typed option."""


class PluginError(RequestError):
    """A quantizer plugin cannot be used."""


class UnknownQuantizerError(PluginError):
    """No installed plugin has the quantizer."""


class BrokenPluginError(PluginError):
    """The message has the fault, and advice for a user. An author needs the fault alone."""

    def __init__(self, fault: str, advice: str = "") -> None:
        super().__init__("; ".join(filter(None, (fault, advice))))
        self.fault = fault


class IncompatiblePluginError(PluginError):
    """The plugin is written for another protocol."""


class DuplicatePluginError(PluginError):
    """Several plugins have the name."""


class BlockedPluginError(PluginError):
    """``MODULORA_BLOCK`` disables the plugin."""


class ShapeError(RequestError):
    """A shape that does not fit."""


class ModelError(RequestError):
    """A model that cannot be found or read."""


class DenseWeightError(ModelError, AttributeError):
    """``hasattr(weight, "data")`` is False then, and ``weight.data`` says what to do."""


class CheckpointError(RequestError):
    """A shard that is missing, truncated or of other shapes."""


class WeightError(RequestError):
    """NaN or Inf in a weight."""


class DataError(RequestError):
    """An empty or malformed data file."""


class AdapterError(RequestError):
    """An adapter that does not fit its base."""


class OutputError(RequestError):
    """An output folder that holds something else."""


class DiskSpaceError(RequestError):
    """Too little room for what would be written."""


class MissingExtraError(RequestError):
    """An optional dependency that is needed."""


class WorkError(ModuLoRAError):
    """The request was fine and the work failed."""


_NO_MEMORY = re.compile(
    r"can't start new thread|can(no|')t allocate memory|out of memory|failed to map segment", re.I
)
"""Words of Python, torch and the system's loader of libraries."""


def lacks_memory(error: BaseException | None) -> BaseException | None:
    """The exception that says that this process got no more memory: ``error``, or its cause."""
    while error is not None:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def note_plugin(error: BaseException, quantizer: str, work: str) -> None:
    """Add a note to a plugin's exception, which a traceback and the command line show.

    Args:
        error: errors of this package get no note, nor does a lack of memory.
        quantizer: the name of the quantizer that raised it.
        work: the work that failed, with the layer or its shape.
    """
    if not isinstance(error, ModuLoRAError) and not lacks_memory(error):
        error.add_note(
            f"{work}, by {quantizer}; `modulora conformance {quantizer}` finds faults of a plugin"
        )


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with the next one after a colon; else its type."""
    first, *others = str(error).strip().split("\n", 2)
    if first.endswith(":") and others:
        first = f"{first} {others[0].strip()}"
    return first or type(error).__name__
