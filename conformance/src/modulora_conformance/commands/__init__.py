"""The commands of the kit; :mod:`modulora_core.cli` says what a command is."""
