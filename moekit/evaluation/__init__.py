"""Evaluation: likelihoods, answers, scores, suites."""
