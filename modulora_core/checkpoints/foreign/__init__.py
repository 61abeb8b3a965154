"""Folders and files that other tools packed, read under our names."""
