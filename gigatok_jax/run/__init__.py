"""Parts of a run around its training: checkpoints, metrics, pictures, page, signals, clusters."""
