"""Array functions and kernels: arrays in, arrays out, no parameters."""
