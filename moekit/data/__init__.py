"""Where examples come from, how they read as text, and how they become batches."""
