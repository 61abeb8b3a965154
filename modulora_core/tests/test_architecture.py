"""Invariants of the source tree. import-linter holds import directions: make check."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modulora_core
from modulora_core.packed import BITS_OF_DTYPE

CORE = Path(modulora_core.__file__).parent
ROOT = CORE.parent

KNOWN_PLUGINS = {"nf4", "int8", "optq", "quip"}

WORDS = {"compare", "convert", "dpo", "evaluate", "kernels", "merge", "recover"}
"""Plugins whose name is a word that the core may use."""


def sources(folder):
    hidden = {path for path in folder.rglob(".*") if path.is_dir()}
    return [path for path in folder.rglob("*.py") if not hidden.intersection(path.parents)]


def core_sources():
    return [path for path in sources(CORE) if "tests" not in path.relative_to(CORE).parts]


def plugin_names():
    return KNOWN_PLUGINS | {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}


def naming(name):
    """A pattern for a plugin's name. If other things have the name, it finds the plugin only."""
    if name in BITS_OF_DTYPE or name in WORDS:
        return rf"modulora[-_]{name}|-q {name}\b|={name}\b"
    return rf"(?<![A-Za-z]){name}(?![a-z])"


def found(pattern):
    """The places in the core where a pattern is, ready to click on."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in core_sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line, flags=re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", sorted(plugin_names()))
def test_the_core_names_no_plugin(name):
    """If this fails: say 'a quantizer', or ask the registry. Examples in help use `-q NAME`."""
    assert found(naming(name)) == []


def test_the_core_names_no_bit_width_of_a_plugin():
    """If this fails: read the width from the plugin's spec. Names of optimizers may have one."""
    assert found(r'(?<![0-9A-Za-z])(?<!["_])[1-8][- ]?bits?\b(?! float)') == []


def test_the_core_names_no_other_package_of_the_project():
    """If this fails: move what needs the package into it, or reach it through the registry."""
    assert found(r"^\s*(from|import) +(modulora_(?!core\b)|examples\b)") == []


# --- the layout ----------------------------------------------------------------------------------


def imports():
    """The modules that each module of the core imports, anywhere in its file."""
    files = {module_name(path): path for path in core_sources()}
    return {
        name: imported(path.read_text(encoding="utf-8"), files.keys()) - {name}
        for name, path in files.items()
    }


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source, modules):
    """The modules that a source imports, in functions and for type checkers too."""
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found.update(n if n in modules else str(node.module) for n in names.values())
    return found & set(modules)


def circles(graph):
    """The strongly connected components of more than one module."""

    @functools.cache
    def reached(module):
        seen, new = set[str](), {module}
        while new:
            new = set().union(*(graph[each] for each in new)) - seen
            seen |= new
        return frozenset(seen)

    found = {frozenset(o for o in reached(m) if m in reached(o)) for m in graph if m in reached(m)}
    return [set(circle) for circle in found]


def test_no_two_files_import_each_other():
    """If this fails: move what both need into a third file. A lazy import only hides a circle."""
    graph = imports()
    assert "modulora_core.spec" in graph["modulora_core.registry"]
    assert circles(graph) == []


# --- the public names ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", modulora_core.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    value = getattr(modulora_core, name)
    assert name in dir(modulora_core)
    if name != "__version__":
        module = f"modulora_core.{modulora_core._PUBLIC[name]}"
        assert value is vars(sys.modules[module])[name]


def test_type_checkers_see_the_same_public_names():
    text = (CORE / "__init__.py").read_text("utf-8")
    imports = re.findall(r"from modulora_core\.([\w.]+) import (\w+) as \2", text)
    assert {name: module for module, name in imports} == modulora_core._PUBLIC


def test_importing_the_package_and_the_contract_imports_nothing_heavy():
    code = """if True:
        import sys
        import modulora_core, modulora_core.spec, modulora_core.registry
        modulora_core.Quantizer, modulora_core.hookimpl, modulora_core.__version__
        sys.exit(str([name for name in ("torch", "numpy", "transformers") if name in sys.modules]))
    """
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600
    )
    assert result.stderr.strip() == "[]"
