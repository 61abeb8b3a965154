"""L0, identity: is the plugin found, and is what it says of itself well formed?"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from modulora_conformance.checks import Level, needs
from modulora_conformance.measurements import Measurements
from modulora_core import hookspecs
from modulora_core.errors import ModuLoRAError, OptionError, ShapeError
from modulora_core.options import parse_options, validate_options
from modulora_core.registry import find
from modulora_core.spec import SUPPORTED_PROTOCOLS, Quantizer

HEAVY = ("torch", "transformers", "numba", "triton", "numpy")
"""What listing quantizers must not import: each takes a user tenths of seconds, for a table of names."""

IMPORT_SECONDS = 0.3
"""Processor time for a hook's module, beyond what modulora_core's own metadata imports take."""


class Identity(Level):
    level, title = "L0", "identity"

    def test_the_protocol_is_supported(self, quantizer: Quantizer) -> None:
        """If this fails: the plugin was written for another version of the contract than the installed modulora-core speaks."""
        assert quantizer.spec.protocol in SUPPORTED_PROTOCOLS, (
            f"spec.protocol: expected one of {list(SUPPORTED_PROTOCOLS)}, got {quantizer.spec.protocol}"
        )

    @needs("test_the_protocol_is_supported")
    def test_the_spec_is_registered_by_an_entry_point(self, quantizer: Quantizer) -> None:
        """If this fails: `pip install` doesn't make the quantizer known, or two things claim its name. Give the package an entry
        point in the group `modulora`, and use one SPEC object for the hook and the class.
        """
        spec = quantizer.spec
        try:
            entry = find(spec.name)
        except ModuLoRAError as error:
            pytest.fail(f"{spec.name}: expected an installed plugin: {error}", pytrace=False)
        assert entry.spec == spec, (
            f"{spec.name}: the installed plugin has another spec: {entry.spec}"
        )
        location = f"{type(quantizer).__module__}:{type(quantizer).__qualname__}"
        assert spec.location == location, f"spec.location: expected {location}, got {spec.location}"

    @needs("test_the_spec_is_registered_by_an_entry_point")
    def test_metadata_is_known_without_torch(self, quantizer: Quantizer) -> None:
        """If this fails: the module of the entry point imports a heavy package, itself or through another module. Keep it to the
        SPEC and the hook, and import the rest where the class is.
        """
        module = _entry_point(quantizer).module
        loaded = _run(
            f"import sys, json, {module}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
        )
        assert loaded == [], (
            f"importing {module}: expected none of {', '.join(HEAVY)}, got {', '.join(loaded)}"
        )

    @needs("test_metadata_is_known_without_torch")
    def test_metadata_is_imported_fast(
        self, quantizer: Quantizer, measurements: Measurements
    ) -> None:
        """If this fails: the module of the entry point does work when it is imported. Every `modulora --help` waits for it."""
        module = _entry_point(quantizer).module
        # processor time, and the best of three: a busy machine must not fail a plugin
        code = (
            "import time, json, modulora_core.hookspecs, modulora_core.spec; start = time.process_time(); "
            f"import {module}; print(json.dumps(time.process_time() - start))"
        )
        seconds = min(float(_run(f"{code}  # {turn}")) for turn in range(3))
        measurements.at_most("import of the hook's module", seconds, IMPORT_SECONDS, unit="seconds")

    def test_options_are_described_and_frozen(self, quantizer: Quantizer) -> None:
        """If this fails: `Options` isn't what the command line, checkpoints and docs need: a frozen pydantic model that forbids
        unknown names, whose fields have a default and a description.
        """
        model = type(quantizer).Options
        undescribed = [
            name
            for name, field in model.model_fields.items()
            if not (field.description or "").strip()
        ]
        assert undescribed == [], f"options without a description: {', '.join(undescribed)}"
        required = [name for name, field in model.model_fields.items() if field.is_required()]
        assert required == [], f"options without a default: {', '.join(required)}"
        options = model()
        for name in model.model_fields:
            with pytest.raises(ValidationError):  # frozen, also where it assigns the same value
                setattr(options, name, getattr(options, name))

    def test_unknown_and_malformed_options_are_refused(self, quantizer: Quantizer) -> None:
        """If this fails: a misspelt option, or a value that isn't one, is taken silently, and a user gets another quantizer than
        the one asked for. Set extra="forbid", and give each field a type that says what it takes.
        """
        model = type(quantizer).Options
        with pytest.raises(ValidationError):
            model.model_validate({**quantizer.options.model_dump(), "no_such_option_": 1})
        for name in model.model_fields:
            with pytest.raises(OptionError):
                validate_options(quantizer.spec.name, model, {name: object()})

    def test_a_checkpoint_records_the_options(self, quantizer: Quantizer) -> None:
        """If this fails: options that went through config.json aren't the ones that went in, so a loaded model is read by another
        quantizer than the one that packed it.
        """
        recorded = json.loads(json.dumps(quantizer.options.model_dump(mode="json")))
        again = validate_options(quantizer.spec.name, type(quantizer).Options, recorded)
        assert again == quantizer.options, f"options: expected {quantizer.options}, got {again}"
        assert type(quantizer)(again).options == quantizer.options

    def test_promised_options_are_accepted(self, quantizer: Quantizer) -> None:
        """If this fails: spec.promises names options that the quantizer refuses."""
        model: type[BaseModel] = type(quantizer).Options
        for promise in quantizer.spec.promises:
            validate_options(quantizer.spec.name, model, promise.options)

    @needs("test_promised_options_are_accepted")
    def test_promised_options_are_read_as_words(self, quantizer: Quantizer) -> None:
        """If this fails: an option that the command line gives, as `-o key=value`, is another one than that of spec.promises, or is
        refused: its field doesn't make the value of a word. Give it one type, such as int, and not int | str.
        """
        name, model = quantizer.spec.name, type(quantizer).Options
        for promise in quantizer.spec.promises:
            words = [
                f"{key}={_word(value)}"
                for key, value in promise.options.items()
                if _has_a_word(value)
            ]
            expected = validate_options(name, model, promise.options).model_dump()
            found = validate_options(
                name, model, {**promise.options, **parse_options(words)}
            ).model_dump()
            differing = [key for key in expected if repr(found[key]) != repr(expected[key])]
            assert not differing, (
                f"-o {' -o '.join(words)}: expected {differing[0]} to be {expected[differing[0]]!r}, as in spec.promises, got "
                f"{found[differing[0]]!r}"
            )

    def test_shapes_follow_the_declared_multiples(self, quantizer: Quantizer) -> None:
        """If this fails: `check_shape` takes shapes that spec.out_multiple and spec.in_multiple exclude, so a model is refused late,
        or not at all. It may refuse more than they do, not less.
        """
        spec = quantizer.spec
        for multiple, shape in ((spec.out_multiple, (spec.out_multiple * 8 + 1, spec.in_multiple * 8)),
                                (spec.in_multiple, (spec.out_multiple * 8, spec.in_multiple * 8 + 1))):  # fmt: skip
            if multiple > 1:
                with pytest.raises(ShapeError):
                    quantizer.check_shape(shape)


def _has_a_word(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def _word(value: object) -> str:
    """A value as it is written on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _entry_point(quantizer: Quantizer) -> EntryPoint:
    """The one that brings this quantizer."""
    for point in entry_points(group=hookspecs.PROJECT):
        try:
            specs = point.load().modulora_quantizers()
        except Exception:  # another plugin, which is broken
            continue
        if quantizer.spec in specs:
            return point
    raise AssertionError(f"{quantizer.spec.name}: no entry point brings it")


@cache
def _run(code: str) -> Any:
    """What a fresh interpreter prints as JSON; run once for all configurations."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return json.loads(done.stdout)
