"""How directions are found: decompositions, rankings and the launch."""
