"""The functions of the commands."""
