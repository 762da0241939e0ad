"""Networks: flax.linen modules with plain fields."""
