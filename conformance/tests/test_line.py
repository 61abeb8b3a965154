"""On a terminal one line shows the running check, in the place of dots."""

import os
import pty
import subprocess
import sys

CHECKS = "def test_one(): pass\ndef test_two(): assert False\ndef test_the_third(): pass\n"

RUN = """
import sys, pytest
from modulora_conformance.run import _Line
words = ["-q", "--tb=no", "-rN", "-p", "no:cacheprovider", "-o", "console_output_style=classic"]
sys.exit(pytest.main([*words, sys.argv[1]], plugins=[_Line()]))
"""


def test_a_terminal_shows_the_running_check_and_a_pipe_shows_dots(tmp_path):
    (tmp_path / "test_checks.py").write_text(CHECKS)
    words = [sys.executable, "-c", RUN, str(tmp_path)]
    environment = {**os.environ, "COLUMNS": "30", "PYTEST_ADDOPTS": "", "NO_COLOR": "1"}
    ours, theirs = pty.openpty()
    shown = subprocess.run(words, stdout=theirs, stderr=theirs, env=environment, cwd=tmp_path)
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    lines = [line.strip() for line in text.replace("\n", "\r").split("\r") if line.strip()]
    assert lines[:3] == ["check 1 of 3: one", "check 2 of 3: two", "check 3 of 3, 1 failed: the t"]
    assert "1 failed, 2 passed" in lines[-1]
    assert shown.returncode == 1
    piped = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ".F." in piped.stdout
    assert "check 1" not in piped.stdout
