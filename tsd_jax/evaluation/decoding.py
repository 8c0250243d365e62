"""Prompts continued token by token: greedily or by sampling, with a cache.

A model's cache is its collection "cache". Prompts are padded on the left, so that the
next slot is the same for all rows: a cache is then written by one slice, not a scatter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tsd_jax.evaluation.cache import empty_cache, read
from tsd_jax.evaluation.sampling import Sampling, draw

ApplyFn = Callable[..., Any]
"""As for `tsd_jax.evaluation.generation.generate`."""

PlaceCache = Callable[[Any], Any]
"""Cache inside a compiled program -> the same cache, with its shardings."""


class Rows(NamedTuple):
    """A batch of prompts.

    Attributes:
      tokens: padded on the left, (B, T) int32.
      mask: False at padding, (B, T) bool.
      numbers: of the prompts, (B, 1) int32; a row's samples depend on its number, and
        not on the rows beside it.
    """

    tokens: Array
    mask: Array
    numbers: Array


class State(NamedTuple):
    """The state between two steps; the model has not read `current` yet.

    Attributes:
      step: number of new tokens, () int32.
      current: last token of each row, (B,) int32.
      ended: whether a row has ended, (B,) bool.
      cache: of the tokens before `current`.
      out: the new tokens, (B, M) int32.
      lengths: number of new tokens of each row before its end, (B,) int32.
    """

    step: Array
    current: Array
    ended: Array
    cache: Any
    out: Array
    lengths: Array


@functools.partial(
    jax.jit, static_argnames=("apply_fn", "max_new_tokens", "place_cache")
)
def start(
    apply_fn: ApplyFn,
    variables: Any,
    rows: Rows,
    *,
    max_new_tokens: int,
    place_cache: PlaceCache,
) -> State:
    """Read the prompts but for their last token, which the first step reads."""
    return State(
        step=jnp.zeros((), jnp.int32),
        current=rows.tokens[:, -1],
        ended=jnp.zeros(len(rows.tokens), bool),
        cache=read_prompts(apply_fn, variables, rows, max_new_tokens, place_cache),
        out=jnp.zeros((len(rows.tokens), max_new_tokens), jnp.int32),
        lengths=jnp.zeros(len(rows.tokens), jnp.int32),
    )


@functools.partial(
    jax.jit, static_argnames=("apply_fn", "sampling"), donate_argnames=("state",)
)
def advance(
    apply_fn: ApplyFn,
    variables: Any,
    rows: Rows,
    state: State,
    *,
    stopped: Array,
    until: Array,
    eos_ids: Array,
    sampling: Sampling | None,
    key: Array | None,
) -> State:
    """Step until there are `until` new tokens, or all rows have ended.

    Args:
      apply_fn: of the model.
      variables: of the model.
      rows: the prompts.
      state: is donated.
      stopped: rows that have ended for a reason of the caller's, (B,) bool.
      until: at most M, () int32.
      eos_ids: tokens that end a row.
      sampling: None takes the most likely token.
      key: to sample with.
    """

    def step(state: State) -> State:
        logits, cache = read(apply_fn, variables, state.cache, state.current[:, None])
        chosen = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
        if sampling is not None:
            chosen = draw(logits[:, -1], sampling, key, rows.numbers[:, 0], state.step)
        chosen = jnp.where(state.ended, state.current, chosen)
        ended = state.ended | jnp.isin(chosen, eos_ids)
        return State(
            step=state.step + 1,
            current=chosen,
            ended=ended,
            cache=cache,
            out=state.out.at[:, state.step].set(chosen),
            lengths=state.lengths + (~ended).astype(jnp.int32),
        )

    def unfinished(state: State) -> Array:
        return (state.step < until) & ~jnp.all(state.ended)

    return lax.while_loop(unfinished, step, state._replace(ended=state.ended | stopped))


def read_prompts(
    apply_fn: ApplyFn,
    variables: Any,
    rows: Rows,
    max_new_tokens: int,
    place_cache: PlaceCache,
) -> Any:
    """Return the cache of prompts but for their last token, with room for new ones."""
    number, length = rows.tokens.shape
    slots = length - 1 + max_new_tokens  # the last new token is not read
    cache = place_cache(empty_cache(apply_fn, variables, number, slots))
    if length == 1:
        return cache
    # These logits are not used, so XLA does not compute them.
    tokens, mask = rows.tokens[:, :-1], rows.mask[:, :-1]
    return read(apply_fn, variables, cache, tokens, mask)[1]
