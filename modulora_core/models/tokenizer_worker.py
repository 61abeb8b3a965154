"""Load a folder's tokenizer in a process of its own, within limits of time and memory.

Libraries in C++ and loops in Python convert a SentencePiece model. A crafted one makes them run for
hours, take gigabytes, or end the process. :mod:`modulora_core.models.tokenizer` runs this file
as a script, and loads the tokenizer itself only after this process has ended well::

    tokenizer_worker.py FOLDER SECONDS BYTES          exit code 0, or a line about the failure
"""

from __future__ import annotations

import os
import sys

from transformers import AutoTokenizer

from modulora_core.errors import first_line
from modulora_core.models.template_worker import limit_memory, limit_time


def main(folder: str, seconds: float, nbytes: int) -> int:
    """Load the tokenizer and encode a text; 1 if a library refuses it."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", errors="replace")
    os.dup2(2, 1)  # nothing else prints among the answers
    limit_memory(nbytes)
    limit_time(seconds)
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("Hello, world")
    except BaseException as error:  # a panic of Rust, too
        answers.write(first_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
