"""Evaluation: losses, scoring by likelihood, generation, tasks."""
