"""Reads images and codes as numpy batches, whose order depends on the seed alone."""
