"""Arrays and pytrees only: specs, adapters, directions, ranking, launch, merging."""
