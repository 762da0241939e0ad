"""Metrics as pure functions, and the tasks that compute them."""
