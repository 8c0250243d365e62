"""Data: reading, prompt templates, encoding and deterministic batches."""
