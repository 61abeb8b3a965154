"""The checks, by level. Nothing heavy is imported here."""

HIGHEST = 9
"""The number of the last level."""
