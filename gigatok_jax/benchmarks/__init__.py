"""Benchmarks: each module with a `main` is run with `python -m`."""
