"""The author of a plugin for an older protocol reads what to change."""

import pytest
from modulora_conformance.__main__ import main


def test_a_plugin_of_protocol_1_is_told_each_change(empty_site, capsys):
    empty_site.install_quantizer("aged", distribution="fake-aged", module="fake_aged", protocol=1)
    assert main(["aged"]) == 1
    first, *changes = capsys.readouterr().out.splitlines()
    assert first == "aged of fake-aged 1.0 is written for protocol 1. For protocol 2:"
    said = " ".join(" ".join(changes).split())
    for word in ("modulora_formats", "modulora_kernels", "modulora_core.hf", "protocol=2"):
        assert word in said
    assert main(["aged", "--json"]) == 1


OLD = {
    "a spec with formats": (
        "from modulora_core import QuantizerSpec, hookimpl\n\n"
        "SPEC = QuantizerSpec(name='aged', summary='', location='a:B', protocol=1, bits=(4,),\n"
        "                     formats=())\n",
        "return the FormatSpecs from the hook modulora_formats",
    ),
    "formats from the spec's module": (
        "from modulora_core.spec import FormatSpec\n",
        "FormatSpec is in modulora_core.hookspecs",
    ),
    "kernels from the core": (
        "import modulora_core.kernels.that_left\n",
        "from modulora_kernels instead of modulora_core.kernels",
    ),
}


@pytest.mark.parametrize(("hook", "advice"), OLD.values(), ids=OLD)
def test_a_plugin_that_breaks_for_its_age_is_told_the_change_and_the_line(
    empty_site, capsys, hook, advice
):
    empty_site.install("fake-aged", {"aged": "fake_aged"}, {"fake_aged": hook})
    assert main(["aged"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert advice in error.partition("; since protocol 2: ")[2]
    assert "fake_aged.py, line" in error
