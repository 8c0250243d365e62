"""The library's own files: written completely or not at all, and checked when read."""
