"""Reads parameters from files of weights, in our formats and PyTorch's, and writes such files."""
