"""Parameters to and from the files of PyTorch programs."""
