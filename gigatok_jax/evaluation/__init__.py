"""Metrics as pure functions, and the tasks that evaluate models and generate images."""
