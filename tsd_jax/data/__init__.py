"""Data: sources, prompt templates, encoding, deterministic iteration."""
