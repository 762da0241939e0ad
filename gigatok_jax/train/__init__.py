"""Training loops, one readable file each, and what they share."""
