"""Package of the networks, which are flax.linen modules with plain fields."""
