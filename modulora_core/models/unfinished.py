"""Files by which a folder is known as unfinished work of ours."""

MARKER = ".modulora-partial"
"""The file that says that a folder is our own unfinished work, so that it may be removed. Who writes there holds a lock on it."""

REQUEST = "request.json"
"""In an unfinished folder: what was asked for. A folder that has it can be gone on with, and so is never removed."""

RUN_FILE = "finetune.yaml"
"""What a run of finetune writes first, into the output folder itself: one that has it and no adapter was begun."""
