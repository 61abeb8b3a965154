"""Imports numba and compiles a function, so that forked processes need not: 0.7 s each."""

from contextlib import suppress

with suppress(ImportError):
    import numba

    numba.njit(lambda: None)()  # imports what every compiled function needs
