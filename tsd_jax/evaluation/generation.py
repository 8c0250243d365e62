"""Generation token by token, with a key-value cache, in one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tsd_jax.core.errors import InputError


class Generated(NamedTuple):
    """Generated tokens.

    Attributes:
      tokens: (B, M) int32, without the prompts; a row that has ended repeats its last
        token.
      lengths: number of tokens of each row before the one that ended it, (B,) int32.
    """

    tokens: Array
    lengths: Array


def generate(
    apply_fn: Callable[..., Any],
    params: Mapping[str, Any],
    tokens: np.ndarray | Array,
    mask: np.ndarray | Array,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    temperature: float = 0.0,
    key: Array | None = None,
) -> Generated:
    """Continue every prompt until it ends or has `max_new_tokens` more tokens.

        next = argmax z,   or next ~ softmax(z / temperature)

    One program is compiled for each shape and `apply_fn` (pass the same object again);
    it stops when all rows have ended.

    Args:
      apply_fn: `model.apply`, plain or adapted, of a model called as
        `(variables, tokens, mask=mask, decode=True, mutable=["cache"])`, which keeps
        the keys and values of earlier tokens in the collection "cache".
      params: the parameters, with bound adapters if `apply_fn` is adapted.
      tokens: the prompts, padded on the left, (B, T) int32.
      mask: False at padding, (B, T) bool.
      max_new_tokens: M, at least 1.
      eos_ids: tokens that end a row; may be empty.
      temperature: of the sampling; 0 takes the most likely token.
      key: typed key to sample with; required if the temperature is not 0.

    Raises:
      InputError: an argument is invalid or does not fit the others.
    """
    _check(tokens, mask, max_new_tokens, temperature, key)
    return _generate(
        apply_fn,
        params,
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(mask, jnp.bool_),
        jnp.asarray(eos_ids, jnp.int32),
        None if temperature == 0 else jnp.asarray(temperature, jnp.float32),
        None if temperature == 0 else key,
        max_new_tokens=max_new_tokens,
    )


def empty_cache(
    apply_fn: Callable[..., Any], params: Any, batch_size: int, length: int
) -> Any:
    """Return an empty collection "cache"; nothing is computed.

    Args:
      apply_fn: as for `generate`.
      params: the parameters.
      batch_size: rows.
      length: slots of each row.
    """
    call = functools.partial(apply_fn, decode=True, mutable=["cache"])
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    _, variables = jax.eval_shape(call, {"params": params}, tokens)
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables["cache"]
    )


class _State(NamedTuple):
    """The state between two steps; the model has not read `current` yet."""

    step: Array
    current: Array
    ended: Array
    cache: Any
    out: Array
    lengths: Array


@functools.partial(jax.jit, static_argnames=("apply_fn", "max_new_tokens"))
def _generate(
    apply_fn: Callable[..., Any],
    params: Any,
    tokens: Array,
    mask: Array,
    eos_ids: Array,
    temperature: Array | None,
    key: Array | None,
    *,
    max_new_tokens: int,
) -> Generated:
    """Read the prompts but for their last token, then step from that one."""
    rows, length = tokens.shape
    read = functools.partial(_read, apply_fn, params)

    def step(state: _State) -> _State:
        logits, cache = read(state.cache, state.current[:, None], None)
        chosen = _choose(logits[:, -1], state.step, temperature, key)
        chosen = jnp.where(state.ended, state.current, chosen)
        ended = state.ended | jnp.isin(chosen, eos_ids)
        out = state.out.at[:, state.step].set(chosen)
        lengths = state.lengths + (~ended).astype(jnp.int32)
        return _State(state.step + 1, chosen, ended, cache, out, lengths)

    def unfinished(state: _State) -> Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.ended)

    cache = empty_cache(apply_fn, params, rows, length - 1 + max_new_tokens)
    if length > 1:  # these logits are not used, so XLA does not compute them
        _, cache = read(cache, tokens[:, :-1], mask[:, :-1])
    end = lax.while_loop(
        unfinished,
        step,
        _State(
            step=jnp.zeros((), jnp.int32),
            current=tokens[:, -1],
            ended=jnp.zeros(rows, bool),
            cache=cache,
            out=jnp.zeros((rows, max_new_tokens), jnp.int32),
            lengths=jnp.zeros(rows, jnp.int32),
        ),
    )
    unwritten = jnp.arange(max_new_tokens)[None, :] >= end.step
    return Generated(jnp.where(unwritten, end.current[:, None], end.out), end.lengths)


def _read(
    apply_fn: Callable[..., Any],
    params: Any,
    cache: Any,
    tokens: Array,
    mask: Array | None,
) -> tuple[Array, Any]:
    """Return the logits (B, T, V) of tokens (B, T), and the new cache."""
    variables = {"params": params, "cache": cache}
    logits, new = apply_fn(variables, tokens, mask=mask, decode=True, mutable=["cache"])
    return logits, new["cache"]


def _choose(
    logits: Array, step: Array, temperature: Array | None, key: Array | None
) -> Array:
    """Return the next token of each row, (B,) int32, from logits (B, V)."""
    if temperature is None or key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    step_key = jax.random.fold_in(key, step)
    return jax.random.categorical(step_key, logits / temperature, axis=-1).astype(
        jnp.int32
    )


def _check(
    tokens: np.ndarray | Array,
    mask: np.ndarray | Array,
    max_new_tokens: int,
    temperature: float,
    key: Array | None,
) -> None:
    """Refuse arguments that would generate nonsense."""
    if tokens.ndim != 2 or 0 in tokens.shape or mask.shape != tokens.shape:
        raise InputError(
            f"tokens {tokens.shape} and mask {mask.shape} must have the same shape "
            "(rows, length), and neither may be empty"
        )
    # An array spread over several hosts cannot be read on one of them.
    seen = not isinstance(mask, Array) or mask.is_fully_addressable
    if seen and not np.asarray(mask)[:, -1].all():
        raise InputError("a prompt ends in padding: pad prompts on the left")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    if temperature < 0:
        raise InputError(f"temperature must be 0 or more, not {temperature}")
    if temperature > 0 and key is None:
        raise InputError("sampling at a temperature above 0 needs a key")
