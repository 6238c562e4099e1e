"""Plans: compile a training step ahead of time for a named slice."""
