"""Package of metrics as pure functions, and of tasks that evaluate models or generate images."""
