"""Training: one optimiser step, and a run of them."""
