"""The exceptions of this package.

::

    ModuLoRAError
    ├── RequestError               the request was wrong; said before any work     exit code 2
    │   ├── OptionError            an unknown or ill-typed option
    │   ├── PluginError            a quantizer plugin cannot be used
    │   │   ├── UnknownQuantizerError
    │   │   ├── BrokenPluginError
    │   │   ├── IncompatiblePluginError
    │   │   ├── DuplicatePluginError
    │   │   └── BlockedPluginError
    │   ├── ShapeError             a shape that does not fit
    │   ├── ModelError             a model that cannot be found or read
    │   ├── CheckpointError        a shard that is missing, truncated or of other shapes
    │   ├── WeightError            NaN or Inf in a weight
    │   ├── DataError              an empty or malformed data file
    │   ├── AdapterError           an adapter that does not fit its base
    │   ├── OutputError            an output folder that holds something else
    │   ├── DiskSpaceError         too little room for what would be written
    │   └── MissingExtraError      an optional dependency that this request needs
    └── WorkError                  the request was fine and the work failed        exit code 1

A message says the subject, the expected value, the value, and what to do, in one line.
"""

from __future__ import annotations


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
    exit_code = 2


class OptionError(RequestError): ...


class PluginError(RequestError): ...


class UnknownQuantizerError(PluginError): ...


class BrokenPluginError(PluginError):
    """The message has the fault, and advice for a user. An author needs the fault alone."""

    def __init__(self, fault: str, advice: str = "") -> None:
        super().__init__("; ".join(filter(None, (fault, advice))))
        self.fault = fault


class IncompatiblePluginError(PluginError): ...


class DuplicatePluginError(PluginError): ...


class BlockedPluginError(PluginError): ...


class ShapeError(RequestError): ...


class ModelError(RequestError): ...


class CheckpointError(RequestError): ...


class WeightError(RequestError): ...


class DataError(RequestError): ...


class AdapterError(RequestError): ...


class OutputError(RequestError): ...


class DiskSpaceError(RequestError): ...


class MissingExtraError(RequestError): ...


class WorkError(ModuLoRAError): ...


def note_plugin(error: BaseException, quantizer: str, work: str) -> None:
    """Add a note to a plugin's exception, which a traceback and the command line show.

    Args:
        error: errors of this package get no note.
        quantizer: the name of the quantizer that raised it.
        work: the work that failed, with the layer or its shape.
    """
    if not isinstance(error, ModuLoRAError):
        error.add_note(
            f"{work}, by {quantizer}; `modulora conformance {quantizer}` finds faults of a plugin"
        )
