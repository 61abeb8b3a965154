"""Python in a process of its own, without waiting each time for torch to be imported.

On Linux a *nursery* is started once: a process that has imported a few modules and nothing else. For each run it forks a child, which
therefore knows no plugin, no kernel, and nothing of the process that asks. Elsewhere forking isn't safe, and each run gets an interpreter
from scratch.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

READY = ("torch", "modulora_core.registry")
"""What a nursery has imported, if nothing else is said."""

MOST = 3
"""Nurseries at a time: each holds what it has imported in memory."""


def run_python(
    *words: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    ready: tuple[str, ...] = READY,
) -> subprocess.CompletedProcess[str]:
    """``python *words`` in another process; as :func:`subprocess.run` has it, with the output as text.

    Args:
        words: ``"-m", module, *arguments``, or ``"-c", code``.
        env: all variables of its environment; by default this process's.
        timeout: seconds.
        ready: modules that the run imports anyway, which need not be imported anew.

    Raises:
        subprocess.TimeoutExpired: it took longer; it was ended.
    """
    # what pytest says of the running test changes all the time, and is none of the other process's business
    chosen = {
        name: value for name, value in (env or os.environ).items() if name != "PYTEST_CURRENT_TEST"
    }
    if sys.platform != "linux":
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=cwd, env=chosen, timeout=timeout, capture_output=True, text=True
        )
    with tempfile.TemporaryDirectory() as kept:
        said = [Path(kept, name) for name in ("stdout", "stderr")]
        request = {"words": words, "cwd": str(cwd), "said": [str(path) for path in said]}
        code = _nursery(chosen, ready).run(request, timeout)
        return subprocess.CompletedProcess(
            words, code, *(p.read_text(errors="replace") for p in said)
        )


class Nursery:
    """The process that forks: it reads requests, a line of JSON each, and answers each with an exit code."""

    def __init__(self, env: Mapping[str, str], ready: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *ready], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, request: Mapping[str, Any], timeout: float) -> int:
        """The exit code of a child that does what ``request`` says: negative where a signal has ended it."""
        given, answers = self._process.stdin, self._process.stdout
        assert given is not None
        assert answers is not None
        given.write(json.dumps(request).encode() + b"\n")
        given.flush()
        if not select.select([answers], [], [], timeout)[0]:
            self.close()
            raise subprocess.TimeoutExpired(list(request["words"]), timeout)
        return int(answers.readline() or -9)  # nothing where the nursery itself was killed

    def close(self) -> None:
        """End it, and the child that is at work."""
        atexit.unregister(self.close)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.__exit__(None, None, None)  # closes the pipes and waits


_nurseries: dict[tuple[tuple[tuple[str, str], ...], tuple[str, ...]], Nursery] = {}
"""By environment and modules: one as it is, and one whose Triton interprets."""


def _nursery(env: Mapping[str, str], ready: tuple[str, ...]) -> Nursery:
    """One that is alive."""
    key = (tuple(sorted(env.items())), ready)
    if key in _nurseries and not _nurseries[key].is_alive:
        _nurseries.pop(key).close()
    if key not in _nurseries:
        while len(_nurseries) >= MOST:
            _nurseries.pop(next(iter(_nurseries))).close()
        _nurseries[key] = Nursery(env, ready)
    return _nurseries[key]


def _serve(ready: Sequence[str]) -> None:
    # -m puts the folder that this process was started in onto the path; a child puts its own
    sys.path.pop(0)
    sys.modules.pop(
        "modulora_conformance", None
    )  # pytest would tell that it can't rewrite its asserts any more
    for name in ready:
        importlib.import_module(name)
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            _work(**json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)


def _work(words: Sequence[str], cwd: str, said: Sequence[str]) -> NoReturn:
    """In the child: run, and end without what the nursery would do at its own end."""
    code: Any = 1
    try:
        os.chdir(cwd)
        for descriptor, path in enumerate([os.devnull, *said]):
            flags = os.O_WRONLY | os.O_CREAT if descriptor else os.O_RDONLY
            os.dup2(os.open(path, flags, 0o600), descriptor)
        kind, what, *arguments = words
        if kind == "-m":
            sys.argv = [what, *arguments]
            sys.path.insert(0, cwd)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *arguments]
            sys.path.insert(0, "")
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})  # what python -c does
        code = 0
    except SystemExit as asked:
        code = asked.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:  # what ends an interpreter with a traceback ends this one so too
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve(sys.argv[1:])
