"""Benchmarks: timings against the dense floor and against other libraries."""
