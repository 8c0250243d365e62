"""LoRA-Dash, LoRA-Init and LoRA-TSD for JAX and Flax (arXiv:2409.01035)."""
