"""In its surroundings: mapped files, several threads, other processors, little memory, no numba; and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from modulora_conformance.compiled_kernels import CompiledKernels
from modulora_half_quadratic.quantizer import HalfQuadratic, Options


class TestKernels(CompiledKernels):
    packing_share = 2.5

    @pytest.fixture
    def quantizers(self):
        chosen = ({"bits": 3}, {"bits": 8, "group_size": 48})
        return [HalfQuadratic(Options(iterations=1, **options)) for options in chosen]


def test_the_options_import_neither_torch_nor_numba():
    code = "import sys, modulora_half_quadratic.options; print(*(sys.modules.keys() & {'torch', 'numba'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_command_line_finds_it_by_its_entry_point_alone(tmp_path: Path):
    """As pip would have installed it: a folder of metadata beside the module."""
    info = tmp_path / "modulora_half_quadratic-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: modulora-half-quadratic\nVersion: 0.1.0\n"
    )
    (info / "entry_points.txt").write_text("[modulora]\nhalf-quadratic = modulora_half_quadratic\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "modulora_core.cli", "list-quantizers", "--json"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (listed,) = (q for q in json.loads(done.stdout)["quantizers"] if q["name"] == "half-quadratic")
    assert listed["status"] == "ok"
    assert listed["bits"] == [1, 2, 3, 4, 5, 6, 7, 8]
