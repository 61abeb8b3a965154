"""Try a chat template of a stranger: jinja's sandbox lets it loop and grow without end.

A template is tried once, on a short conversation, in a process with limits of time and memory.
"""

from __future__ import annotations

import functools
import subprocess
import sys

SECONDS = 1
_BYTES = 512 * 2**20

_TRIAL = f"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_BYTES}, {_BYTES}))
    resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
except ImportError:  # Windows
    pass
import re
from jinja2.sandbox import ImmutableSandboxedEnvironment
try:
    jinja = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    text = re.sub(r"{{%-?\\s*(end)?generation\\s*-?%}}", "", sys.stdin.buffer.read().decode())
    roles = ["system", "user", "assistant", "user"]
    jinja.from_string(text).render(
        messages=[{{"role": role, "content": "text"}} for role in roles],
        add_generation_prompt=True, bos_token="<s>", eos_token="</s>",
        strftime_now=lambda form: form, tools=None,
    )
except MemoryError:
    sys.exit(3)
except Exception:  # real conversations show it, with a message
    pass
"""


@functools.lru_cache(maxsize=64)
def ends_soon(template: str) -> bool:
    """Whether the template renders a short conversation in a second and 512 MiB."""
    command = [sys.executable, "-c", _TRIAL]
    try:
        data = template.encode("utf-8", "replace")
        tried = subprocess.run(command, input=data, capture_output=True, timeout=4 * SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode in (0, 1)  # 1: jinja is missing there
