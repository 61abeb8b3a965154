"""The GitHub Action and the GitLab template are valid, and call commands that exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from modulora_core.cli.app import load_command

CI = Path(__file__).parents[1] / "ci"


def scripts():
    """``{name: (shell script, variables that are set)}``."""
    action = yaml.safe_load((CI / "action.yml").read_text("utf-8"))
    assert action["runs"]["using"] == "composite"
    steps = [step for step in action["runs"]["steps"] if "run" in step]
    assert all(step["shell"] == "bash" for step in steps)
    inputs = {value for step in steps for value in step["env"].values()}
    assert inputs == {
        f"${{{{ inputs.{name} }}}}" for name in ("quantizer", "package", "arguments", "report")
    }
    job = yaml.safe_load((CI / "gitlab.yml").read_text("utf-8"))[".modulora-conformance"]
    own = {"GITHUB_ACTION_PATH", "GITHUB_STEP_SUMMARY"}.union(*(step["env"] for step in steps))
    return {
        "action.yml": ("\n".join(step["run"] for step in steps), own),
        "gitlab.yml": ("\n".join(job["script"]), set(job["variables"])),
    }


@pytest.mark.parametrize(("script", "known"), scripts().values(), ids=scripts())
def test_its_commands_have_their_flags_and_its_variables_are_set(script, known):
    assert set(re.findall(r"\$([A-Z_]+)", script)) <= known
    (line,) = [line for line in script.splitlines() if "modulora conformance" in line]
    command, _, _ = line.strip().partition(" || ")
    name, *words = shlex.split(command)[1:]
    flags = {word for word in [*words, "--certified"] if word.startswith("-")}
    assert flags <= {flag for parameter in load_command(name).params for flag in parameter.opts}


def test_the_action_installs_this_repository(tmp_path):
    script, _ = scripts()["action.yml"]
    install = shlex.split(script.splitlines()[0])
    paths = [word.replace("$GITHUB_ACTION_PATH", str(CI)) for word in install if "/" in word]
    for path, project in zip(paths, ("modulora-core", "modulora-conformance"), strict=True):
        assert f'name = "{project}"' in (Path(path) / "pyproject.toml").read_text("utf-8")
