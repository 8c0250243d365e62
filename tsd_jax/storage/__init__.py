"""The project's own files, written in full or not at all, and checked when read."""
