"""Plans for hardware that is not there."""
