"""The embedded default: tasks and text that need no network."""
