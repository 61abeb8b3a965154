"""Compiled code: nobody needs it to understand the method."""
