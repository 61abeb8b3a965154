"""A class of checks for each quantizer of the zoo, and the guard's subclasses. Tests run it."""

import importlib

import pytest
from modulora_conformance import QuantizerConformance
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_zoo import SPECS


def member(name):
    module, _ = SPECS[name].location.split(":")
    return getattr(importlib.import_module(module), name)


def patched(name):
    """A fixture that replaces what the class's ``patches`` name."""

    def patch(self, monkeypatch):
        for target, value in member(name).patches.items():
            monkeypatch.setattr(target, value)

    return patch


for name, spec in SPECS.items():
    if ".kernels" in spec.location:
        members = {
            "quantizers": pytest.fixture(lambda self, name=name: [member(name)()]),
            "packing_share": 4.0 if "Packs" in name else None,
            "instruction_sets": True,
        }
        globals()[f"Test{name}"] = type(f"Test{name}", (CompiledKernels,), members)
    else:
        members = {
            "quantizer": pytest.fixture(lambda self, name=name: member(name)()),
            "__module__": __name__,
        }
        if ".layers" in spec.location:
            members["patched"] = pytest.fixture(autouse=True)(patched(name))
        globals()[f"Test{name}"] = type(f"Test{name}", (QuantizerConformance,), members)


class Given(QuantizerConformance):
    __test__ = False

    @pytest.fixture
    def quantizer(self):
        return member("Healthy")()


@pytest.mark.parametrize("size", [16, 64])
class TestParametrized(QuantizerConformance):
    @pytest.fixture
    def quantizer(self, size):
        cls = member("Healthy")
        return cls(cls.Options(group_size=size))


class TestNothingTaken(Given):
    __test__ = True


class TestOverrides(Given):
    __test__ = True

    def test_the_protocol_is_supported(self):
        pass


class TestDeletes(Given):
    __test__ = True
    test_options_are_described_and_frozen = None


class TestOverridesTheGuard(Given):
    __test__ = True
    test_the_protocol_is_supported = None

    def test_no_check_is_overridden_or_deleted(self):
        pass


class TestOverridesWithoutReason(Given):
    __test__ = True

    @pytest.mark.xfail(strict=True)
    def test_the_protocol_is_supported(self):
        raise AssertionError


class TestOverridesWithoutStrict(Given):
    __test__ = True

    @pytest.mark.xfail(strict=False, reason="sometimes")
    def test_the_protocol_is_supported(self):
        raise AssertionError


class TestChangesALevel(Given):
    __test__ = True
    level = "L9"


class TestSaysWhy(Given):
    __test__ = True

    @pytest.fixture
    def quantizer(self):
        return member("LaxOptions")()

    @pytest.mark.xfail(strict=True, reason="old checkpoints have options with unknown names")
    def test_unknown_and_malformed_options_are_refused(self, quantizer):
        super().test_unknown_and_malformed_options_are_refused(quantizer)


class TestSaysWhyWithoutCause(Given):
    __test__ = True

    @pytest.mark.xfail(strict=True, reason="I thought so")
    def test_the_protocol_is_supported(self, quantizer):
        super().test_the_protocol_is_supported(quantizer)
