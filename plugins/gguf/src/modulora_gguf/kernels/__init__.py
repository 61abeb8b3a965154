"""Compiled code for some types. Nobody needs it to understand them; they are in reference.py."""
