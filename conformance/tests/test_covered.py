"""The count of branches: what hides behind a condition is named, by file and line."""

import ast
import textwrap
from pathlib import Path

import modulora_kernels
import pytest
from modulora_conformance.covered import branches
from modulora_conformance.covered.branches import (
    Explanation,
    Source,
    counted,
    explained,
    pyproject_of,
)
from modulora_conformance.covered.source import Module, expanded, modules_of, reached

from modulora_core.errors import DataError
from modulora_core.registry import create

HIDDEN = Path(__file__).parent / "zoo" / "modulora_zoo" / "hidden.py"


def toured(name):
    quantizer = create(name)
    source = Source(quantizer)
    source.recorder.start()
    quantizer.layout((2, 2))
    source.recorder.stop()
    return source.branches([{}])


@pytest.fixture(scope="module")
def hidden(zoo):
    return toured("zoo-hidden")


def test_each_mistake_behind_a_condition_is_named_by_file_and_line(hidden):
    lines = HIDDEN.read_text().splitlines()
    marked = {n for n, line in enumerate(lines, 1) if "  # hidden" in line}
    found = {b.line for b in hidden.missing if Path(b.file) == HIDDEN}
    assert len(marked) >= 20
    assert {lines[n - 1] for n in marked ^ found} == set()


def test_a_sound_one_with_conditions_has_none(zoo):
    own = [b for b in toured("zoo-branching").missing if Path(b.file) == HIDDEN]
    assert [b.name for b in own if '== "meta"' not in b.name] == []  # a check of L7 runs that


def sources():
    here = Path(modulora_kernels.__file__).parents[3]
    return sorted({*here.glob("*/src/**/*.py"), *HIDDEN.parent.glob("*.py")})


def test_a_copy_with_a_line_for_each_part_is_the_same_program():
    for path in sources():
        source = path.read_text()
        tree = ast.parse(source)
        copy, origin, parts = expanded(source, tree)
        assert ast.dump(ast.parse(copy)) == ast.dump(tree), path
        lines = copy.split("\n")
        assert len(origin) == len(lines) + 1
        assert copy.count("\n") - source.count("\n") == 2 * len(parts)


def test_each_part_of_a_condition_begins_a_line_of_the_copy():
    source = "def f(a, é):\n    return 'é' and (a if é else [b for b in é if b]), lambda: a or é\n"
    copy, origin, parts = expanded(source, ast.parse(source))
    lines = copy.split("\n")
    found = {part.text: "".join(lines[n - 1] for n in part.copied) for part in parts}
    assert found == {
        "a": "a",
        "b": "b",
        "[b for b in é if b]": "[(b) for b in é if b]",
        "a if é else [b for b in é if b]": "(a) if é else ([(b) for b in é if b])",
        "é": "é",
        "a or é": "a or (é)",
    }
    assert {part.line for part in parts} == {2}
    assert {origin[line] for part in parts for line in part.copied} == {2}


def module(tmp_path, text, name="plugin.it"):
    path = tmp_path / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    return Module(name, path)


@pytest.mark.parametrize(
    ("used", "found"),
    [
        ("helper()", {"Q", "helper"}),
        ("self.helper()", {"Q"}),
        ("getattr(it, 'helper')()", {"Q", "helper"}),
        ("globals()['hel' + 'per']()", {"Q", "helper", "other"}),
        ("TABLE[0]()", {"Q", "TABLE", "other"}),
        ("1", {"Q"}),
    ],
)
def test_functions_that_the_quantizer_names_are_reached(tmp_path, used, found):
    text = f"class Q:\n    def pack(self): {used}\ndef helper(): pass\ndef other(): pass\n"
    made = module(tmp_path, f"{text}TABLE = [other]\n" if "TABLE" in used else text)
    cls = type("Q", (), {"__module__": "plugin.it"})
    (statements,) = reached([made], [cls]).values()
    names = {getattr(s, "name", "TABLE") for s in statements}
    assert names == found


def test_a_branch_keeps_its_name_when_lines_move(hidden):
    (branch,) = [b for b in hidden.missing if "at_a_size: if" in b.name]
    name = "modulora_zoo.hidden:at_a_size: if packed.shape[0] == 7919:  # hidden -> return -W"
    assert branch.name == name
    for covers in (name, "modulora_zoo.hidden:at_a_size", "modulora_zoo.hidden"):
        assert Explanation(branch=covers, reason="it is").covers(name)
    assert not Explanation(branch="modulora_zoo.hidden:at_a", reason="it is").covers(name)


def test_explanations_are_read_from_the_plugins_own_pyproject(hidden, tmp_path, monkeypatch):
    file = tmp_path / "pyproject.toml"
    monkeypatch.setattr(branches, "pyproject_of", lambda quantizer: file)
    entries = [("modulora_zoo.gone", "r"), ("modulora_zoo.hidden", "why")]
    written = ", ".join(f"{{branch = '{name}', reason = '{reason}'}}" for name, reason in entries)
    file.write_text(f"[tool.modulora.conformance]\nnot_covered = [{written}]\n")
    units = [(branch, False) for branch in hidden.missing]
    found = counted(units, explained(create("zoo-hidden")))
    assert found.stale == ("modulora_zoo.gone",)
    assert not [b for b in found.missing if Path(b.file) == HIDDEN]
    assert {b.reason for b in found.explained} == {"why"}
    file.write_text("[tool.modulora.conformance]\nnot_covered = [{branch = 'a'}]\n")
    with pytest.raises(DataError, match="not_covered"):
        explained(create("zoo-hidden"))


def test_the_pyproject_of_a_plugin_is_above_its_package():
    assert pyproject_of(create("nf4")).parent.name == "nf4"
    assert [m.name for m in modules_of("modulora_nf4") if "kernels" in m.name] == [
        "modulora_nf4.kernels", "modulora_nf4.kernels.cpu", "modulora_nf4.kernels.gpu",
    ]  # fmt: skip
