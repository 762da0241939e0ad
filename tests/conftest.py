"""Runs every test on the CPU with a cache of compiled programs shared by the session."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
