"""Builds, installs and checks each third-party package of ``examples/``, as an outsider's CI.

tests/test_third_party_plugin.py adds the kit for the quantizer.
"""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1]
PACKAGES = {
    path.parent.name: "".join(
        module.read_text() for module in path.parent.glob("src/*/__init__.py")
    )
    for path in sorted(EXAMPLES.glob("third_party_*/pyproject.toml"))
}
"""The modules of the hooks, by the folder of the package."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_it_passes_its_own_tests(name, install, run, tmp_path):
    package = EXAMPLES / name
    words = ["-q", "-p", "no:cacheprovider", "-c", str(package / "pyproject.toml")]
    certified = [f"--ignore={each}" for each in package.glob("tests/test_*_conformance.py")]
    done = run(tmp_path, install(package), "pytest", str(package / "tests"), *words, *certified)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
