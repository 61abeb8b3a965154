"""Kill commands at random moments, run them again, and compare the bytes of OUT.

Twenty kills of each command by hand, from the root of the repository::

    python -m modulora_core.tests.killed_runs 20 SEED
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from modulora_core.checkpoints.outputs import MARKER, partial_name
from modulora_core.checkpoints.shards import JOURNAL
from modulora_core.errors import RequestError
from modulora_core.tests.adapted_models import save_llama_with_tokenizer

TOY = Path(__file__).parent / "toy_site"
COMMANDS = ("quantize", "finetune", "merge", "convert")
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
ENDS = {0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM}
"""Exit codes of a run that got a signal, perhaps after its work."""

SERVER = """
import json, os, signal, sys
import torch, transformers, modulora_core.cli.app as app
from modulora_core import quantize, finetune, merge
from modulora_core.training.trainer import AdapterTrainer
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os._exit(app.run(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks a process for each command, so that no import is waited for."""


class Commands:
    """Runs commands of modulora in a folder, and kills them. ``sites`` install more plugins."""

    def __init__(self, folder, *sites):
        self.folder = folder
        paths = os.pathsep.join(map(str, (*sites, TOY, TOY.parents[2])))
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, text=True, stdin=-1, stdout=-1,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def close(self):
        self._server.communicate("")

    def run(self, words, number=0, after=0, lines=0):
        """Run a command and return its exit code.

        Args:
            words: of the command; the third is OUT.
            number: a signal to send ``after`` seconds since the command has made OUT, or
                OUT.partial with so many ``lines`` in its journal. ``self.seconds`` is the time from
                there to the end.
        """
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(words) + "\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        out = self.folder / words[2]
        while not (out.exists() or _lines(partial_name(out)) >= lines or self._ended(child)):
            time.sleep(0.001)
        begin = time.monotonic()
        if number:
            time.sleep(after)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(child, number)
        code = int(self._server.stdout.readline())
        self.seconds = time.monotonic() - begin
        return code

    def _ended(self, child):
        return not Path(f"/proc/{child}/fd").exists()

    @property
    def said(self):
        """The output of the last command."""
        return (self.folder / "log").read_text()


def _lines(partial):
    """The lines of an OUT.partial's journal; -1 without OUT.partial."""
    journal = partial / JOURNAL
    return journal.read_text().count("\n") if journal.exists() else partial.exists() - 1


class Works:
    """The four commands on a tiny model, with bytes and seconds of uninterrupted runs."""

    def __init__(self, folder):
        sizes = {"intermediate_size": 256, "num_hidden_layers": 6}
        save_llama_with_tokenizer(folder / "dense", **sizes)
        (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 40)
        self.commands = Commands(folder)
        self.words = {
            "quantize": ["quantize", "dense", "packed", "-q", "toy"],
            "finetune": ["finetune", "packed", "adapter", *_TRAINING],
            "merge": ["merge", "packed", "merged", "--adapter", "adapter"],
            "convert": ["convert", "packed", "converted", "--to", "crude"],
        }
        self.whole = {}
        self.seconds = {}
        for name, words in self.words.items():
            assert self.commands.run(words) == 0, self.commands.said
            self.seconds[name] = self.commands.seconds
            self.whole[name] = self.content(name)
        for words in self.words.values():
            words[2] = f"{words[2]}-again"

    def out(self, name):
        return self.commands.folder / self.words[name][2]

    def content(self, name):
        """The files of OUT if it is complete, else none."""
        out = self.out(name)
        if name == "finetune":
            files = [out / "adapter_config.json", out / "adapter_model.safetensors"]
            files *= files[0].is_file()
        else:
            files = [path for path in out.glob("*") if path.name != MARKER]
        return {path.name: path.read_bytes() for path in files}

    def kill(self, name, number, after):
        """Run a command, send it a signal, and run it again until it is done.

        Args:
            after: a fraction of the time in which an uninterrupted run writes OUT.

        Returns:
            how it went on: ``complete``, ``again``, or ``resumed``.
        """
        run, words, out = self.commands.run, self.words[name], self.out(name)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial_name(out), ignore_errors=True)
        code = run(words, number, after * self.seconds[name])
        assert code in ENDS, (code, self.commands.said)
        how = "complete"
        if not self.content(name):
            assert code != 0, self.commands.said
            how, code = "again", run(words)
            if code == RequestError.exit_code and "--resume" in self.commands.said:
                how, code = "resumed", run([*words, "--resume"])
            assert code == 0, self.commands.said
        assert self.content(name) == self.whole[name]
        assert not partial_name(out).exists()
        return how


_TRAINING = ["--data", "text.txt", "--steps", "6", "--save-every", "2", "--batch-size", "2",
             "--grad-accum", "1", "--seq-len", "32"]  # fmt: skip


def main(kills, seed):
    """Kill each command so many times, and print how it went on."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        works = Works(Path(folder))
        for name in COMMANDS:
            found = Counter()
            for _ in range(kills):
                number, after = moments.choice(SIGNALS), moments.uniform(0, 1)
                found[f"{number.name} {works.kill(name, number, after)}"] += 1
            print(name, f"{works.seconds[name]:.1f} s", dict(sorted(found.items())), flush=True)
        works.commands.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
