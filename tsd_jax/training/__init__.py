"""State, optimizer groups, step, loop, sharding, checkpoints."""
