"""Beam search, with the scores and the stopping rules of transformers.

Of every prompt K beams run: sequences with their log-likelihoods. Each step continues
all of them by all tokens; the likeliest continuations that have not ended run on, and
those among the K likeliest that have ended are finished: the K best of them are kept.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.cache import cache_axes, choose_rows, read, repeat_rows
from tsd_jax.evaluation.decoding import ApplyFn, PlaceCache, Rows, read_prompts

NEVER = -1e9
"""Score of what may not win: finite, as in transformers."""


@dataclass(frozen=True, kw_only=True)
class Beams:
    """How beams are scored, and when a search ends.

    Attributes:
      number: K, beams of a prompt, at least 2.
      length_penalty: a finished sequence of n tokens, its end included, scores
        log-likelihood / n ^ length_penalty; above 0 favours long ones.
      early_stopping: True ends once K sequences are finished. False ends once the
        likeliest beam could not enter them if it were finished now; "never" once it
        could not at any length.
    """

    number: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self):
        """Refuse searches that are none."""
        if self.number < 2:
            raise InputError(f"a beam search needs 2 beams or more, not {self.number}")
        if not math.isfinite(self.length_penalty):
            raise InputError(
                f"length_penalty must be a finite number, not {self.length_penalty}"
            )
        if self.early_stopping not in (True, False, "never"):
            raise InputError(
                f"early_stopping must be True, False or 'never', not "
                f"{self.early_stopping!r}"
            )


class Sequences(NamedTuple):
    """The sequences of every prompt, best first.

    Attributes:
      tokens: (B, K, M) int32.
      scores: (B, K) float32.
      lengths: number of tokens before the end, (B, K) int32.
      finished: (B, K) bool.
    """

    tokens: Array
    scores: Array
    lengths: Array
    finished: Array

    def choose(self, indices: Array) -> Sequences:
        """Return the sequences at indices (B, N)."""

        def of_row(row: Sequences, own: Array) -> Sequences:
            return jax.tree.map(lambda leaf: leaf[own], row)

        return jax.vmap(of_row)(self, indices)

    def best(self, number: int) -> Sequences:
        """Return the `number` sequences with the highest scores."""
        return self.choose(lax.top_k(self.scores, number)[1])


class _Search(NamedTuple):
    """The state between two steps; the model has not read `current` (B, K) yet."""

    step: Array
    current: Array
    cache: Any
    running: Sequences
    kept: Sequences
    open: Array  # whether a prompt's beams may still enter what is kept, (B,) bool


@functools.partial(
    jax.jit, static_argnames=("apply_fn", "beams", "max_new_tokens", "place_cache")
)
def search(
    apply_fn: ApplyFn,
    variables: Any,
    rows: Rows,
    *,
    eos_ids: Array,
    beams: Beams,
    max_new_tokens: int,
    place_cache: PlaceCache,
) -> tuple[Array, Array]:
    """Return the best sequence of each prompt.

    Args:
      apply_fn: of the model.
      variables: of the model.
      rows: B prompts.
      eos_ids: tokens that end a sequence.
      beams: how to search.
      max_new_tokens: M.
      place_cache: shards a cache.

    Returns:
      Tokens (B, M) int32, and the number of them before the end (B,) int32.
    """
    number = beams.number
    axes = cache_axes(apply_fn, variables)
    cache = read_prompts(apply_fn, variables, rows, max_new_tokens, place_cache)
    cache = place_cache(repeat_rows(cache, axes, number))
    first = rows.tokens.shape[1] - 1

    def step(search: _Search) -> _Search:
        tokens = search.current.reshape(-1, 1)
        logits, cache = read(apply_fn, variables, search.cache, tokens)
        chances = jax.nn.log_softmax(logits[:, -1].astype(jnp.float32))
        chances = chances.reshape(*search.current.shape, -1)
        parents, new = _continue(search, chances, eos_ids, max_new_tokens)
        running, chosen = _run_on(new, number)
        kept = _keep(search, new, beams)
        search = _Search(
            step=search.step + 1,
            current=running.tokens[:, :, search.step],
            cache=choose_rows(
                cache, axes, jnp.take_along_axis(parents, chosen, axis=1), first
            ),
            running=running,
            kept=kept,
            open=search.open,
        )
        return search._replace(open=search.open & _open(search, beams, max_new_tokens))

    def unfinished(search: _Search) -> Array:
        return (search.step < max_new_tokens) & jnp.any(search.open)

    end = lax.while_loop(unfinished, step, _begin(rows, cache, number, max_new_tokens))
    return end.kept.tokens[:, 0], end.kept.lengths[:, 0]


def _begin(rows: Rows, cache: Any, number: int, max_new_tokens: int) -> _Search:
    """Start from one beam a prompt: the others are its copies, and may not win."""
    size = len(rows.tokens)
    none = Sequences(
        tokens=jnp.zeros((size, number, max_new_tokens), jnp.int32),
        scores=jnp.full((size, number), NEVER, jnp.float32),
        lengths=jnp.zeros((size, number), jnp.int32),
        finished=jnp.zeros((size, number), bool),
    )
    return _Search(
        step=jnp.zeros((), jnp.int32),
        current=jnp.repeat(rows.tokens[:, -1:], number, axis=1),
        cache=cache,
        running=none._replace(scores=none.scores.at[:, 0].set(0)),
        kept=none,
        open=jnp.ones(size, bool),
    )


def _continue(
    search: _Search, chances: Array, eos_ids: Array, max_new_tokens: int
) -> tuple[Array, Sequences]:
    """Return the likeliest continuations, best first, and the beams they continue.

    They are as many as leave K running whichever of them have ended.

    Args:
      search: the state.
      chances: log-probability of each next token, (B, K, V).
      eos_ids: tokens that end a sequence.
      max_new_tokens: M.
    """
    number, vocabulary = chances.shape[1:]
    count = min(max(2, 1 + len(eos_ids)) * number, number * vocabulary)
    scores = search.running.scores[:, :, None] + chances
    scores, flat = lax.top_k(scores.reshape(len(scores), -1), count)
    parents, tokens = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
    new = search.running.choose(parents)
    ended = jnp.isin(tokens, eos_ids)
    return parents, Sequences(
        tokens=new.tokens.at[:, :, search.step].set(tokens),
        scores=scores,
        lengths=search.step + 1 - ended.astype(jnp.int32),
        finished=ended | (search.step + 1 == max_new_tokens),
    )


def _run_on(new: Sequences, number: int) -> tuple[Sequences, Array]:
    """Return the best sequences that have not finished, and their indices."""
    scores = jnp.where(new.finished, new.scores + NEVER, new.scores)
    chosen = lax.top_k(scores, number)[1]
    return new._replace(scores=scores).choose(chosen), chosen


def _keep(search: _Search, new: Sequences, beams: Beams) -> Sequences:
    """Return the best finished sequences, old and new."""
    top = jnp.arange(new.scores.shape[1]) < beams.number
    finished = new.finished & top[None, :] & search.open[:, None]
    length = (search.step + 1).astype(jnp.float32)
    scores = new.scores / length**beams.length_penalty
    scores = jnp.where(finished, scores, NEVER)
    new = new._replace(scores=scores, finished=finished)
    both = jax.tree.map(
        lambda one, other: jnp.concatenate([one, other], axis=1), search.kept, new
    )
    return both.best(beams.number)


def _open(search: _Search, beams: Beams, max_new_tokens: int) -> Array:
    """Return whether each prompt's beams may still enter what is kept, (B,) bool."""
    full = jnp.all(search.kept.finished, axis=1)
    if beams.early_stopping is True:
        return ~full
    longest = beams.early_stopping == "never" and beams.length_penalty > 0
    length = jnp.where(longest, max_new_tokens, search.step).astype(jnp.float32)
    possible = search.running.scores[:, 0] / length**beams.length_penalty
    worst = jnp.min(search.kept.scores, axis=1)
    return ~full | (possible > worst)
