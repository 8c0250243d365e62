"""The changes of a merge, where the base's head is its embedding."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.families.registry import FAMILIES
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.merge_full import replaced
from tsd_jax.huggingface.names import EMBEDDING, HEAD


class Change(NamedTuple):
    """What is merged into one tensor of the base.

    Attributes:
      full: values that replace it, or rows of it, or None.
      factors: of dK, which is added afterwards, or None.
    """

    full: FullTensor | None = None
    factors: Factors | None = None

    def applied(self, stored: np.ndarray) -> np.ndarray:
        """Return the changed tensor, in float32 or wider.

        Args:
          stored: the base's tensor.
        """
        exact = stored.astype(np.promote_types(stored.dtype, np.float32))
        if self.full is not None:
            exact = replaced(stored, self.full)
        return exact if self.factors is None else self.factors.applied(exact)

    def equals(self, other: Change) -> bool:
        """Return whether both have the same values."""
        mine, theirs = self._leaves(), other._leaves()
        return len(mine) == len(theirs) and all(map(np.array_equal, mine, theirs))

    def _leaves(self) -> list[Any]:
        full = [] if self.full is None else [self.full.value, self.full.rows or ()]
        some = self.factors or ()
        return [*full, *(leaf for leaf in some if leaf is not None)]


class TiedChanges(NamedTuple):
    """Changes of a base whose head is its embedding.

    Attributes:
      changes: {tensor: its change}.
      untied: whether the head needs a weight of its own from now on.
    """

    changes: dict[str, Change]
    untied: bool


def changes_of(
    factors: Mapping[str, Factors], full: Mapping[str, FullTensor]
) -> dict[str, Change]:
    """Return {torch tensor: its change}.

    Args:
      factors: {torch module: dK of it}.
      full: {torch tensor: its trained values}.
    """
    changes = {name: Change(full=each) for name, each in full.items()}
    for module, pair in factors.items():
        name = f"{module}.weight"
        changes[name] = Change(full.get(name), pair)
    return changes


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the head of a model is its embedding.

    Args:
      config: content of its config.json.
    """
    tied = config.get("tie_word_embeddings")
    family = FAMILIES.get(str(config.get("model_type")))
    if tied is None and family is not None:
        tied = family.defaults.get("tie_word_embeddings")
    return bool(tied)


def tied_changes(
    changes: Mapping[str, Change], stored: Collection[str], *, head_follows: bool
) -> TiedChanges:
    """Return the changes that a tied base needs for the function that was trained.

    Args:
      changes: {tensor: its change}, as trained.
      stored: names of the base's tensors; some bases store a copy of the head.
      head_follows: whether the head has what is trained of the embedding alone.
    """
    new = dict(changes)
    head, embedding = new.get(HEAD), new.get(EMBEDDING)
    if head is not None and embedding is not None and head.equals(embedding):
        head, head_follows = None, True
        del new[HEAD]
    if head is not None or (embedding is not None and not head_follows):
        if head is not None and head.full is None and embedding and head_follows:
            new[HEAD] = head._replace(full=embedding.full)
        return TiedChanges(new, untied=True)
    if embedding is not None and HEAD in stored:
        new[HEAD] = embedding
    return TiedChanges(new, untied=False)
