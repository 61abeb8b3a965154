"""The command line: ``modulora COMMAND ...``, the same as ``python -m modulora_core.cli``.

A command is a function ``command(...) -> Report`` of any plugin, imported on dispatch. Its package
returns a :class:`~modulora_core.hookspecs.CommandSpec` from the hook ``modulora_commands``, as
:mod:`modulora_core.cli.commands` does. ``examples/third_party_command`` is a complete one.

In the module, ``PANELS`` may group the parameters' names by the title of their panel in the help.

A command whose first argument is MODEL gets ``--revision REV``: it then reads ``MODEL@REV``. Before
it runs, its places are looked for, unless ``CHECKS_PLACES`` in the module says that it does so.

A command raises and returns, and prints nothing itself. :mod:`~modulora_core.cli.app` adds
``--json`` and ``--debug``, prints the report as text or as an object, and prints every
:class:`~modulora_core.errors.ModuLoRAError` as one sentence on stderr. With ``--json`` the error is
also an object on stdout, ``{"error": {"kind", "message"}}``, and libraries print to stderr. Notes
and streamed text go through :func:`~modulora_core.cli.terminal.terminal`.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    from modulora_core.cli.app import run

    return run(arguments)
