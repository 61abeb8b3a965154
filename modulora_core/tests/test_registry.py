"""Discovery: each plugin on its own, with a status and a reason."""

import sys

import pytest

from modulora_core import registry
from modulora_core.errors import (
    BlockedPluginError,
    BrokenPluginError,
    DuplicatePluginError,
    IncompatiblePluginError,
    UnknownQuantizerError,
)
from modulora_core.tests.fake_site import HOOK, failing, spec


def named(name):
    return [entry for entry in registry.entries() if entry.name == name]


# --- listing -------------------------------------------------------------------------------------


HOOKED = "from modulora_core import hookimpl\n@hookimpl\n"
BROKEN = {
    "it fails to import": (failing("no such GPU"), "RuntimeError: no such GPU"),
    "it exits": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "its spec is malformed": (
        HOOK.format(specs=spec("Alpha", "m:C")),
        "QuantizerSpec: name: String should match pattern",
    ),
    "its hook has another name": (
        HOOKED + "def modulora_quantisers(): return []",
        "unknown hook 'modulora_quantisers'",
    ),
    "its hook isn't marked": ("def modulora_quantizers(): return []", "@hookimpl"),
    "its hook fails": (
        HOOKED + "def modulora_quantizers(): return 1 / 0",
        "ZeroDivisionError",
    ),
    "its hook returns something else": (
        HOOKED + "def modulora_quantizers(): return ['x']",
        "expected a list of QuantizerSpec, got ['x']",
    ),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plugin_is_listed_with_its_reason_and_harms_no_other(site, source, reason):
    site.install("fake-broken", {"broken": "fake_broken"}, {"fake_broken": source})
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha")
    (broken,) = named("broken")
    assert broken.status == "broken"
    assert broken.spec is None
    assert reason in str(broken.reason)
    assert registry.find("alpha").status == "ok"
    with pytest.raises(
        BrokenPluginError, match=r"quantizer 'broken' of fake-broken 1\.0 is broken"
    ) as raised:
        registry.find("broken")
    assert reason in str(raised.value)


# --- versions, duplicates, the block list --------------------------------------------------------


def test_a_plugin_of_another_protocol_is_incompatible_and_says_both(site):
    site.install_quantizer("future", distribution="fake-future", module="fake_future", protocol=9)
    (entry,) = named("future")
    assert entry.status == "incompatible"
    with pytest.raises(
        IncompatiblePluginError, match=r"written for protocol 9, .* supports 2"
    ) as raised:
        registry.create("future")
    assert "fake-future 1.0" in str(raised.value)


def test_two_distributions_with_one_name_are_an_error_that_names_both(site):
    site.install_quantizer("twin", distribution="fake-one", module="fake_one", version="1.1")
    site.install_quantizer("twin", distribution="fake-two", module="fake_two", version="2.2")
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha")
    assert [(e.distribution, e.status) for e in named("twin")] == [
        ("fake-one", "duplicate"),
        ("fake-two", "duplicate"),
    ]
    with pytest.raises(
        DuplicatePluginError, match=r"'twin'.* fake-\w+ \d\.\d and fake-\w+ \d\.\d"
    ) as raised:
        registry.load("twin")
    assert "fake-one 1.1" in str(raised.value)
    assert "fake-two 2.2" in str(raised.value)
    assert registry.find("alpha").status == "ok"


@pytest.mark.parametrize("block", ["alpha", "other, alpha", "ALPHA", "fake-alpha", "Fake_Alpha"])
def test_a_blocked_plugin_is_not_imported_and_says_so(site, monkeypatch, block):
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha")
    monkeypatch.setenv(registry.BLOCK_VARIABLE, block)
    assert [entry.status for entry in named("alpha")] == ["blocked"]
    assert "fake_alpha" not in sys.modules
    with pytest.raises(BlockedPluginError, match=f"disabled by MODULORA_BLOCK={block}"):
        registry.find("alpha")
    monkeypatch.delenv(registry.BLOCK_VARIABLE)
    assert registry.find("alpha").status == "ok"


# --- unknown names -------------------------------------------------------------------------------


def test_an_unknown_name_says_near_misses_and_what_is_installed(site):
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha")
    site.install("fake-broken", {"beta": "fake_broken"}, {"fake_broken": failing("oh")})
    with pytest.raises(UnknownQuantizerError) as raised:
        registry.create("alhpa")
    message = str(raised.value)
    assert "'alhpa' isn't installed; did you mean 'alpha'?" in message
    assert "alpha" in message.partition("Installed: ")[2].partition(";")[0].split(", ")
    assert "not usable: beta (broken)" in message
    assert "Install its package" not in message


def test_an_unknown_name_from_a_checkpoint_says_what_to_install(site):
    with pytest.raises(UnknownQuantizerError, match="Install its package, fake-gamma, or a newer"):
        registry.find("gamma", distribution="fake-gamma")


@pytest.mark.parametrize(
    "hostile", ["-r evil.txt", "evil; rm -rf /", "git+https://evil", "--index-url=x", ""]
)
def test_a_checkpoint_can_not_put_a_command_into_the_message(site, hostile):
    with pytest.raises(UnknownQuantizerError) as raised:
        registry.find("gamma", distribution=hostile)
    assert "Install its package" not in str(raised.value)
