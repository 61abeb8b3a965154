"""Which quantizer packs which layers: a small YAML file that people write, or a program.

::

    default: NAME                      # or NAME:KEY=VALUE,... or null, which leaves layers dense
    layers:                            # the last pattern that matches counts
      "model.layers.*.mlp.down_proj": NAME:bits=4
      "model.layers.0.*": {quantizer: NAME, options: {bits: 8}}
    head: NAME
    embeddings: NAME
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, InstanceOf, PrivateAttr

from modulora_core.errors import OptionError, PluginError
from modulora_core.models.json_files import read_yaml
from modulora_core.models.sites import LinearSite
from modulora_core.options import validate_model
from modulora_core.registry import Choice
from modulora_core.spec import Quantizer


def _choice(value: object) -> object:
    """Make a choice of ``NAME``, ``NAME:KEY=VALUE,...``, or a mapping of both fields."""
    try:
        if isinstance(value, str):
            return Choice.parse(value, "quantizer")
        if isinstance(value, Mapping) and {"quantizer"} <= value.keys() <= {"quantizer", "options"}:
            name, options = value["quantizer"], value.get("options") or {}
            if isinstance(name, str) and isinstance(options, Mapping):
                return Choice(name, options)
    except OptionError as error:
        raise ValueError(str(error)) from None
    if value is None or isinstance(value, Choice):
        return value
    raise ValueError("expected NAME, NAME:KEY=VALUE,... or {quantizer: NAME, options: {...}}")


_Choice = Annotated[InstanceOf[Choice] | None, BeforeValidator(_choice)]
"""A choice, or None for dense weights."""


class Assignment(BaseModel):
    """Which quantizer packs which layers.

    Choices may be given as text, as in a file::

        Assignment(default="NAME", layers={"*.mlp.*": "NAME:bits=8"}, head="OTHER")
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: _Choice
    """Packs the layers that match no pattern; None leaves them dense."""
    layers: Mapping[str, _Choice] = {}
    """By pattern (fnmatch, of a module's dotted path or a parameter's name), the layers' choice."""
    head: _Choice = None
    """Packs the output head, embeddings the input embedding; None leaves an end dense."""
    embeddings: _Choice = None
    _file: str = PrivateAttr("")

    if TYPE_CHECKING:  # text is a choice too

        def __init__(
            self,
            *,
            default: Choice | str | None,
            layers: Mapping[str, Choice | str | None] = ...,
            head: Choice | str | None = None,
            embeddings: Choice | str | None = None,
        ) -> None: ...

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a YAML file. :meth:`create` will check names and options of quantizers.

        Raises:
            OptionError: the file can't be read, or isn't an assignment; the message names the key.
        """
        values = read_yaml(Path(path), OptionError)
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise OptionError(
                f"assignment {path}: expected lines such as `default: NAME`, got "
                f"{type(values).__name__}"
            )
        if values.get("layers", {}) is None:  # a title with nothing below it
            values["layers"] = {}
        found = validate_model(f"assignment {path}", cls, values)
        found._file = f"assignment {path}: "
        return found

    def patterns_of(self, linears: Sequence[LinearSite]) -> dict[str, str | None]:
        """By a layer's name, the last pattern that matches it; None where the default counts.

        Raises OptionError: a pattern matches no layer.
        """
        found: dict[str, str | None] = dict.fromkeys(linear.name for linear in linears)
        for pattern in self.layers:
            names = [
                linear.name
                for linear in linears
                if fnmatchcase(linear.module, pattern) or fnmatchcase(linear.name, pattern)
            ]
            if not names:
                raise OptionError(
                    f"{self._file}{_key(pattern)}: expected a pattern that matches one or more "
                    f"of the {len(linears)} linear layers, such as "
                    f"{linears[0].module if linears else '(none)'}"
                )
            found |= dict.fromkeys(names, pattern)
        return found

    def choice(self, pattern: str | None) -> Choice | None:
        """The choice for the layers of a pattern, or the default; None leaves them dense."""
        return self.default if pattern is None else self.layers[pattern]

    def create(self, pattern: str | None) -> Quantizer | None:
        """The quantizer of :meth:`choice`. Raises PluginError and OptionError as Choice.create."""
        choice = self.choice(pattern)
        with self.named(_key(pattern)):
            return None if choice is None else choice.create()

    def map_choices(self, change: Callable[[Choice], Choice]) -> Self:
        """The assignment with other choices for all layers."""
        changed: dict[str | None, Choice | None] = {}
        for pattern in (None, *self.layers):
            choice = self.choice(pattern)
            with self.named(_key(pattern)):
                changed[pattern] = None if choice is None else change(choice)
        default = changed.pop(None)
        return self.model_copy(update={"default": default, "layers": changed})

    @contextmanager
    def named(self, key: str) -> Iterator[None]:
        """Let messages about a key of a file begin with the file and the key."""
        try:
            yield
        except (PluginError, OptionError) as error:
            if not self._file:
                raise
            raise type(error)(f"{self._file}{key}: {error}") from None


def _key(pattern: str | None) -> str:
    return "default" if pattern is None else f"layers, {pattern!r}"
