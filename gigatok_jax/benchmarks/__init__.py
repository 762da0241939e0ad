"""Timings: each is a module with a `main`, run with `python -m`."""
