"""Package of the training loops of a tokenizer and of a prior, and of the code that both use."""
