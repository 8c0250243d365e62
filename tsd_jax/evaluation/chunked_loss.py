"""Next-token likelihoods of a model whose logits never exist all at once.

Logits of T tokens over V words are often the largest array of a training step, and the
head's products its largest ones. Here hidden states are mapped to logits a chunk of
positions at a time, and only those that count: the weights of a batch say which.
The gradient is made in the same pass, so no logits are kept or computed twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import CustomVJPPrimal

from tsd_jax.core.errors import InputError
from tsd_jax.core.types import Batch, LossFn
from tsd_jax.evaluation.loss import ScoreFn, token_log_likelihood

Head = Callable[[Any, Array], Array]
"""(variables of the head, hidden states (B, C, D)) -> logits (B, C, V)."""


class SplitModel(NamedTuple):
    """A language model as two functions: up to its last hidden states, and its head.

    Attributes:
      hidden: (variables, tokens (B, T)) -> hidden states (B, T, D).
      head: (variables of the head, hidden states (B, C, D)) -> logits (B, C, V).
      head_variables: variables -> those that the head reads.
      vocabulary: V.
    """

    hidden: Callable[..., Array]
    head: Head
    head_variables: Callable[[Any], Any]
    vocabulary: int


def most_counted(weights: np.ndarray) -> int:
    """Return the most positions of a row that count; 1 where none do.

    Args:
      weights: of all rows, (N, T).
    """
    return int(np.count_nonzero(weights, axis=1).max(initial=1))


class Chunks(NamedTuple):
    """Positions that count, cut into n chunks of C.

    Attributes:
      x: hidden states, (n, B, C, D).
      targets: (n, B, C) int32.
      weights: (n, B, C) float32; 0 at the padding of the last chunk.
    """

    x: Array
    targets: Array
    weights: Array


def chunked_next_token_loss(
    model: SplitModel, *, counted: int | None = None, chunk_bytes: int | None = None
) -> LossFn:
    """Return the loss (variables, batch) -> (summed loss, summed weights), float32.

    It is `next_token_loss` to rounding, and so is its gradient.

    Args:
      model: the model in two parts.
      counted: the most positions of a row whose weight is not 0; None for all. The
        loss is nan where a row has more.
      chunk_bytes: float32 logits that exist at a time; by default 32 MiB on CPUs,
        which stay in their caches, and 512 MiB elsewhere.
    """

    def loss_fn(variables: Any, batch: Batch) -> tuple[Array, Array]:
        x = model.hidden(variables, batch["tokens"])
        chunks = _cut(x, batch, model.vocabulary, counted, chunk_bytes)
        head_variables = model.head_variables(variables)
        loss = cast(Array, _summed_loss(model.head, head_variables, chunks))
        count = jnp.sum(batch["weights"], dtype=jnp.float32)
        return jnp.where(_all_there(batch, chunks), loss, jnp.nan), count

    return loss_fn


def chunked_sequence_log_likelihood(
    model: SplitModel, *, counted: int | None = None, chunk_bytes: int | None = None
) -> ScoreFn:
    """Return the score (variables, batch) -> log-likelihood of each row, (B,) float32.

    Args:
      model: the model in two parts.
      counted: see `chunked_next_token_loss`; scores are nan where a row has more.
      chunk_bytes: see `chunked_next_token_loss`.
    """

    def score_fn(variables: Any, batch: Batch) -> Array:
        x = model.hidden(variables, batch["tokens"])
        chunks = _cut(x, batch, model.vocabulary, counted, chunk_bytes)
        head_variables = model.head_variables(variables)

        def add(total: Array, chunk: Chunks) -> tuple[Array, None]:
            return total + _weighted(model.head, head_variables, chunk), None

        scores, _ = lax.scan(add, jnp.zeros(x.shape[0], jnp.float32), chunks)
        return jnp.where(_all_there(batch, chunks), scores, jnp.nan)

    return score_fn


def _cut(
    x: Array, batch: Batch, vocabulary: int, counted: int | None, limit: int | None
) -> Chunks:
    """Gather the positions that count, and cut them into chunks.

    Rows stay whole: a batch that is sharded over its rows stays so.

    Raises:
      InputError: `counted` is less than 1.
    """
    weights = jnp.asarray(batch["weights"], jnp.float32)
    targets = jnp.asarray(batch["targets"], jnp.int32)
    rows, length = targets.shape
    if counted is not None and counted < 1:
        raise InputError(f"counted is {counted}; it must be at least 1, or None")
    if counted is not None and counted < length:
        order = jnp.argsort(weights == 0, axis=1, stable=True)[:, :counted]
        x = jnp.take_along_axis(x, order[:, :, None], axis=1)
        targets = jnp.take_along_axis(targets, order, axis=1)
        weights = jnp.take_along_axis(weights, order, axis=1)
        length = counted
    if limit is None:
        limit = 2**25 if jax.default_backend() == "cpu" else 2**29
    number = math.ceil(length / max(1, limit // (4 * vocabulary * rows)))
    size = math.ceil(length / number)

    def cut(array: Array) -> Array:
        rest = [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, ((0, 0), (0, number * size - length), *rest))
        return jnp.moveaxis(padded.reshape(rows, number, size, *array.shape[2:]), 1, 0)

    return Chunks(cut(x), cut(targets), cut(weights))


def _all_there(batch: Batch, chunks: Chunks) -> Array:
    """Return whether no position that counts was left out."""
    there = jnp.count_nonzero(chunks.weights)
    return there == jnp.count_nonzero(jnp.asarray(batch["weights"]))


def _weighted(head: Head, variables: Any, chunk: Chunks) -> Array:
    """Return the weighted log-likelihood of each row of a chunk, (B,) float32."""
    likelihood = token_log_likelihood(head(variables, chunk.x), chunk.targets)
    return jnp.sum(likelihood * chunk.weights, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(head: Head, variables: Any, chunks: Chunks) -> Array:
    """Return the summed loss of all chunks, () float32."""

    def add(total: Array, chunk: Chunks) -> tuple[Array, None]:
        return total - jnp.sum(_weighted(head, variables, chunk)), None

    return lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(head: Head, variables: Any, chunks: Any) -> tuple[Array, tuple[Any, Any]]:
    """Return the summed loss, and its gradient: of what trains, and of the states.

    Only what is differentiated has a gradient, so that a frozen head costs two
    products and not three.

    Args:
      head: of the model.
      variables: of the head; a tree of `CustomVJPPrimal`.
      chunks: `Chunks` of `CustomVJPPrimal`.
    """
    leaves, tree = jax.tree.flatten(
        variables, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal)
    )
    trained = [leaf.value for leaf in leaves if leaf.perturbed]
    values = Chunks(*(each.value for each in chunks))

    def loss(trained: list[Array], x: Array, chunk: Chunks) -> Array:
        rest = iter(trained)
        filled = [next(rest) if leaf.perturbed else leaf.value for leaf in leaves]
        whole = tree.unflatten(filled)
        return -jnp.sum(_weighted(head, whole, chunk._replace(x=x)))

    moves = chunks.x.perturbed
    gradient = jax.value_and_grad(loss, argnums=(0, 1) if moves else (0,))

    def add(carry: Any, chunk: Chunks) -> tuple[Any, Any]:
        total, sums = carry
        value, (of_trained, *of_x) = gradient(trained, chunk.x, chunk)
        return (total + value, jax.tree.map(jnp.add, sums, of_trained)), of_x

    zeros = jax.tree.map(jnp.zeros_like, trained)
    start = (jnp.zeros((), jnp.float32), zeros)
    (total, sums), of_x = lax.scan(add, start, values)
    rest = iter(sums)
    of_variables = tree.unflatten(
        [next(rest) if leaf.perturbed else None for leaf in leaves]
    )
    return total, (of_variables, of_x[0] if moves else None)


def _backward(head: Head, gradients: tuple[Any, Any], cotangent: Array) -> Any:
    """Scale the gradient that the forward pass made."""
    del head
    of_variables, of_x = jax.tree.map(
        lambda leaf: (cotangent * leaf).astype(leaf.dtype), gradients
    )
    return of_variables, Chunks(of_x, None, None)  # pyright: ignore


_summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)
