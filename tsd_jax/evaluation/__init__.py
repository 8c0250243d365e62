"""Evaluation: losses, scoring by likelihood, generation and grading."""
