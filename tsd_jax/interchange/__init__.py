"""Interchange: adapters for other libraries."""
