"""A pytest plugin that leaves all results of a run in one file of JSON: ``-p zoo_results``, with ``MODULORA_ZOO_RESULTS``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = session.config.pluginmanager.get_plugin("modulora_conformance_recorder")
    results = {result.quantizer: result.to_json() for result in recorder.results()}
    Path(os.environ["MODULORA_ZOO_RESULTS"]).write_text(json.dumps(results))
