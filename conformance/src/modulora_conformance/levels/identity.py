"""L0: the plugin is found, and its metadata is well formed."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.metadata import entry_points

import pytest
from pydantic import ValidationError

from modulora_conformance.checks import Level, needs
from modulora_core import hookspecs
from modulora_core.errors import ModuLoRAError, OptionError, ShapeError
from modulora_core.options import parse_options, validate_model
from modulora_core.registry import find
from modulora_core.spec import SUPPORTED_PROTOCOLS, Quantizer

HEAVY = ("torch", "transformers", "numba", "triton", "numpy")
"""Listing quantizers imports none of these: each takes tenths of seconds."""

IMPORT_SECONDS = 0.3
"""The most processor time for importing the hook's module, after modulora_core's metadata."""


class Identity(Level):
    """The plugin is found by its entry point. Its spec and its options are well formed."""

    level, title = "L0", "identity"

    def test_the_protocol_is_supported(self, quantizer):
        """If this fails: the installed modulora-core does not support the plugin's protocol."""
        found = quantizer.spec.protocol
        assert found in SUPPORTED_PROTOCOLS, (
            f"spec.protocol: expected one of {list(SUPPORTED_PROTOCOLS)}, got {found}"
        )

    @needs("test_the_protocol_is_supported")
    def test_the_spec_is_registered_by_an_entry_point(self, quantizer):
        """If this fails: `pip install` does not register the quantizer, or two plugins claim its
        name.

        Give the package an entry point in the group `modulora`. Use one SPEC object for the hook
        and the class."""
        spec = quantizer.spec
        try:
            entry = find(spec.name)
        except ModuLoRAError as error:
            pytest.fail(f"{spec.name}: expected an installed plugin: {error}", pytrace=False)
        assert entry.spec == spec, (
            f"{spec.name}: expected the spec of the installed plugin, {entry.spec}, got {spec}"
        )
        location = f"{type(quantizer).__module__}:{type(quantizer).__qualname__}"
        assert spec.location == location, f"spec.location: expected {location}, got {spec.location}"

    @needs("test_the_spec_is_registered_by_an_entry_point")
    def test_metadata_is_known_without_torch(self, quantizer):
        """If this fails: the module of the entry point imports a heavy package, perhaps indirectly.

        Keep only the SPEC and the hook in it. Import everything else in the class's module.
        """
        module = _hook_module(quantizer)
        loaded, _ = _import(module)
        assert loaded == [], (
            f"importing {module}: expected none of {', '.join(HEAVY)}, got {', '.join(loaded)}"
        )

    @needs("test_metadata_is_known_without_torch")
    def test_metadata_is_imported_fast(self, quantizer, measurements):
        """If this fails: importing the entry point's module takes long, and so does `modulora
        --help`."""
        # a busy machine must not fail a plugin: processor time, and the best of three
        for turn in range(3):
            _, seconds = _import(_hook_module(quantizer), turn)
            if seconds <= IMPORT_SECONDS:
                break
        measurements.at_most("import of the hook's module", seconds, IMPORT_SECONDS, unit="seconds")

    def test_options_are_described_and_frozen(self, quantizer):
        """If this fails: `Options` does not suit the command line, checkpoints and docs.

        It must be a frozen pydantic model that forbids unknown names. Every field needs a default
        and a description."""
        model = type(quantizer).Options
        fields = model.model_fields.items()
        undescribed = [name for name, field in fields if not (field.description or "").strip()]
        assert undescribed == [], f"options without a description: {', '.join(undescribed)}"
        required = [name for name, field in fields if field.is_required()]
        assert required == [], f"options without a default: {', '.join(required)}"
        options = model()
        for name in model.model_fields:
            with pytest.raises(ValidationError):
                setattr(options, name, getattr(options, name))

    def test_unknown_and_malformed_options_are_refused(self, quantizer):
        """If this fails: a misspelt option or a wrong value is accepted silently.

        Set extra="forbid", and give each field a precise type.
        """
        model = type(quantizer).Options
        with pytest.raises(ValidationError):
            model.model_validate({**quantizer.options.model_dump(), "no_such_option_": 1})
        for name in model.model_fields:
            with pytest.raises(OptionError):
                validate_model(quantizer.spec.name, model, {name: object()})

    def test_a_checkpoint_records_the_options(self, quantizer):
        """If this fails: options change on their way through config.json.

        The quantizer that reads the model would then differ from the quantizer that packed it.
        """
        recorded = json.loads(json.dumps(quantizer.options.model_dump(mode="json")))
        again = validate_model(quantizer.spec.name, type(quantizer).Options, recorded)
        assert again == quantizer.options, f"options: expected {quantizer.options}, got {again}"
        assert type(quantizer)(again).options == quantizer.options

    def test_promised_options_are_accepted(self, quantizer):
        """If this fails: spec.promises names options that the quantizer refuses."""
        for promise in quantizer.spec.promises:
            validate_model(quantizer.spec.name, type(quantizer).Options, promise.options)

    @needs("test_promised_options_are_accepted")
    def test_promised_options_are_read_as_words(self, quantizer):
        """If this fails: `-o key=value` gives another value than spec.promises, or is refused.

        The field does not convert a word. Give it one type, such as int, and not int | str.
        """
        name, model = quantizer.spec.name, type(quantizer).Options
        for promise in quantizer.spec.promises:
            words = [
                f"{key}={str(value).lower() if isinstance(value, bool) else value}"
                for key, value in promise.options.items()
                if isinstance(value, (bool, int, float, str))
            ]
            expected = validate_model(name, model, promise.options).model_dump()
            given = {**promise.options, **parse_options(words)}
            found = validate_model(name, model, given).model_dump()
            for key in expected:
                assert repr(found[key]) == repr(expected[key]), (
                    f"-o {' -o '.join(words)}: expected {key} to be {expected[key]!r}, as in "
                    f"spec.promises, got {found[key]!r}"
                )

    def test_shapes_follow_the_declared_multiples(self, quantizer):
        """If this fails: `check_shape` accepts shapes that spec.out_multiple or in_multiple
        excludes.

        A model is then refused late. `check_shape` may refuse more shapes, but not fewer.
        """
        multiples = (quantizer.spec.out_multiple, quantizer.spec.in_multiple)
        for i, multiple in enumerate(multiples):
            if multiple > 1:
                shape = [8 * m for m in multiples]
                shape[i] += 1
                with pytest.raises(ShapeError):
                    quantizer.check_shape((shape[0], shape[1]))


def _hook_module(quantizer: Quantizer) -> str:
    """The module of the entry point that registers this quantizer."""
    for point in entry_points(group=hookspecs.PROJECT):
        try:
            specs = point.load().modulora_quantizers()
        except Exception:  # another plugin is broken
            continue
        if quantizer.spec in specs:
            return point.module
    raise AssertionError(f"{quantizer.spec.name}: expected an entry point, got none")


@cache  # for all configurations
def _import(module: str, turn: int = 0) -> tuple[list[str], float]:  # noqa: ARG001  # a new try
    """Import a module in a new interpreter. Give the heavy packages then present, and seconds."""
    code = (
        "import sys, time, json, modulora_core.hookspecs, modulora_core.spec\n"
        f"start = time.process_time(); import {module}; seconds = time.process_time() - start\n"
        f"print(json.dumps([[m for m in {HEAVY!r} if m in sys.modules], seconds]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    loaded, seconds = json.loads(done.stdout)
    return loaded, seconds
