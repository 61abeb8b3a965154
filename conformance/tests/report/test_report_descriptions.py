from __future__ import annotations

from modulora_conformance import QuantizerConformance
from modulora_conformance.checks import checks_of
from modulora_conformance.descriptions import about, meanings


def test_every_level_has_a_title_and_a_text_without_its_number() -> None:
    told = about(QuantizerConformance)
    assert list(told) == sorted({level.level for _, _, level in checks_of(QuantizerConformance)})
    for level, words in told.items():
        assert words["title"]
        assert words["text"]
        assert not words["text"].startswith((level, words["title"]))


def test_every_check_tells_what_it_means_when_it_fails() -> None:
    told = meanings(QuantizerConformance)
    names = {name for name in dir(QuantizerConformance) if name.startswith("test_")}
    assert told.keys() >= names
    assert [name for name, text in told.items() if not text.startswith("If this fails")] == []
