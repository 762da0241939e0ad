"""Converts parameters to and from the files of PyTorch programs."""
