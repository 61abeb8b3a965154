"""Loading a quantizer's class, and constructing it with options."""

import pytest

from modulora_core import registry
from modulora_core.errors import BrokenPluginError, OptionError
from modulora_core.tests.fake_site import HOOK, QUANTIZER, failing, spec


def test_create_constructs_the_class_with_parsed_options(site):
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha")
    quantizer = registry.create(
        "alpha", registry.parse_options(["group_size=128", "symmetric=false"])
    )
    assert type(quantizer) is registry.load("alpha")
    assert quantizer.spec == registry.find("alpha").spec
    assert quantizer.options.model_dump() == {"group_size": 128, "symmetric": False}
    assert registry.create("alpha").options.model_dump() == {"group_size": 64, "symmetric": True}


BAD_CLASSES = {
    "its module fails": (
        failing("no kernel"),
        "importing fake_bad_q:Mine failed: RuntimeError: no kernel",
    ),
    "its class is missing": ("Other = 1", "has no attribute 'Mine'"),
    "it is of another base": ("class Mine: pass", "expected a subclass of Quantizer"),
    "it is incomplete": (
        "from modulora_core import Quantizer\nclass Mine(Quantizer):\n  def pack(self, *_): ...",
        "doesn't implement dequantize_tile",
    ),
    "its spec differs": (
        QUANTIZER.format(module="fake_bad").replace("SPECS[0]", "SPECS[1]"),
        "expected Mine.spec to equal the listed",
    ),
    "its options are no model": (
        QUANTIZER.format(module="fake_bad").replace("Options = Options", "Options = dict"),
        "expected Mine.Options to be a pydantic model",
    ),
}


@pytest.mark.parametrize(("source", "reason"), BAD_CLASSES.values(), ids=BAD_CLASSES.keys())
def test_a_broken_class_is_refused_with_the_reason(site, source, reason):
    specs = f"{spec('bad', 'fake_bad_q:Mine')}, {spec('bad-too', 'fake_bad_q:Mine')}"
    site.install(
        "fake-bad",
        {"bad": "fake_bad"},
        {"fake_bad": HOOK.format(specs=specs), "fake_bad_q": source},
    )
    assert registry.find("bad").status == "ok"  # known only when the class is imported
    with pytest.raises(BrokenPluginError, match=r"quantizer 'bad' of fake-bad 1\.0") as raised:
        registry.load("bad")
    assert reason in str(raised.value)


BAD_OPTIONS = {
    "unknown": (
        {"groupsize": "64"},
        ["unknown option 'groupsize'", "did you mean 'group_size'?", "symmetric"],
    ),
    "of another type": (
        {"group_size": "many"},
        ["option 'group_size'", "integer", "got 'many'", "share one scale"],
    ),
    "refused by the plugin": (
        {"group_size": 63},
        ["option 'group_size': expected an even number, got 63"],
    ),
}


@pytest.mark.parametrize(("options", "parts"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_option_is_named_with_what_was_expected_and_what_came(site, options, parts):
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha")
    with pytest.raises(OptionError, match=r"^quantizer 'alpha': ") as raised:
        registry.create("alpha", options)
    message = str(raised.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


def test_a_quantizer_without_options_says_so(site):
    source = QUANTIZER.format(module="fake_plain").replace("    Options = Options\n", "")
    hook = HOOK.format(specs=spec("plain", "fake_plain_q:Mine"))
    site.install(
        "fake-plain", {"plain": "fake_plain"}, {"fake_plain": hook, "fake_plain_q": source}
    )
    with pytest.raises(OptionError, match="unknown option 'bits' \\(it takes no options\\)"):
        registry.create("plain", {"bits": "4"})
