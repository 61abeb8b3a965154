"""Write whole models in one file: what a plugin implements beside reading them."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from modulora_core.errors import OptionError
from modulora_core.models.formats import FormatReader, recognise_file


class FileFormat(FormatReader):
    """A whole model in one file, which is read and written. Subclass it in a plugin.

    The core writes names, shapes and metadata. The types of tensors are the plugin's.
    """

    @abstractmethod
    def type_of(self, kind: str, in_features: int) -> str:
        """The type of rows of ``in_features`` weights if the user asks for ``kind``: that type, or
        the nearest that can hold such rows.

        Raises:
            OptionError: weights aren't packed to a type of this name.
        """

    @abstractmethod
    def pack(self, weight: Tensor, kind: str) -> Tensor:
        """The rows of ``weight``, fp32 ``[rows, in]``, as bytes: uint8 ``[rows, row bytes]``.

        Raises:
            WeightError: the type can't hold these values.
        """

    @abstractmethod
    def unpack(self, rows: Tensor, kind: str) -> Tensor:
        """The fp32 weights of rows of bytes."""


def create_file_format(file: str) -> FileFormat:
    """The installed format that writes files of this suffix.

    Raises:
        OptionError: no installed plugin writes such a file.
        PluginError: the plugin can't be used.
    """
    known = recognise_file(file)
    found = None if known is None else known.reader()
    if not isinstance(found, FileFormat):
        raise OptionError(f"{file}: no installed plugin writes such a file; install one that does")
    return found
