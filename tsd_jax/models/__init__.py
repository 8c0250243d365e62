"""Plain Flax models that know nothing of adapters, and their Hugging Face names."""
