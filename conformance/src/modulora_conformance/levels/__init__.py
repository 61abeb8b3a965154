"""Checks a quantizer level by level: each module is one level."""
