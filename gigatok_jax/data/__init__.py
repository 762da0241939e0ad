"""Images from folders and embedded sets, as numpy batches whose order depends on the seed alone."""
