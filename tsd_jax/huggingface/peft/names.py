"""The names PEFT uses: its files' tensors, and the modules that it treats specially."""

from __future__ import annotations

PREFIX = "base_model.model."
"""The start of every tensor's name, before that of the torch module."""
MAGNITUDE = "lora_magnitude_vector"
"""DoRA's magnitudes of a module."""
TRAINED_ROWS = "token_adapter.trainable_tokens_delta"
"""The trained rows of an embedding: values, despite the name, not differences."""
CLASSIFIER = "classifier"
"""The module that PEFT always saves of a classification."""


def factor_name(module: str, side: str) -> str:
    """Return the tensor that holds one factor of a module's LoRA.

    Args:
      module: of torch.
      side: "A" or "B".
    """
    return f"{PREFIX}{module}.lora_{side}.weight"


def magnitude_name(module: str) -> str:
    """Return the tensor that holds DoRA's magnitudes of a module."""
    return f"{PREFIX}{module}.{MAGNITUDE}"


def embedding_factor_name(module: str, side: str) -> str:
    """Return the tensor that holds one factor of an embedding's LoRA.

    Args:
      module: of torch.
      side: "A", (r, rows), or "B", (width, r).
    """
    return f"{PREFIX}{module}.lora_embedding_{side}"


def is_embedding(module: str) -> bool:
    """Return whether a torch module looks rows up, by its name."""
    return "embed" in module.rpartition(".")[2]
