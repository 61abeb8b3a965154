"""The checks, by level. Nothing heavy is imported here."""

HIGHEST = 7
"""The number of the last level."""
