"""Training: optimizer, step, state, checkpoints, the loop and its log."""
