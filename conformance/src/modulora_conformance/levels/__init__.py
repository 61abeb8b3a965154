"""The checks, by level. Nothing heavy is imported here."""

HIGHEST = 8
"""The number of the last level."""
