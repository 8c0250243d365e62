"""How adapters meet a model: what is Flax-specific and nothing else."""
