"""Files of weights to parameters and back; knows no run."""
