"""Tokens added to a tokenizer, and the rows that a decoder gets for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.names import TOKEN_AXES
from tsd_jax.models.config import DecoderConfig


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, int]:
    """Add tokens to a tokenizer, in order; return the range (start, stop) of their ids.

    Args:
      tokenizer: of transformers; changed in place.
      tokens: new and distinct.

    Raises:
      InputError: a token is empty, given twice or known already.
    """
    known = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if not isinstance(token, str) or not token:
            raise InputError(
                f"added token {token!r} is not text: give each token as a string"
            )
        if token in known or token in tokens[:number]:
            raise InputError(
                f"the tokenizer already has token {token!r}: give new tokens, once each"
            )
    tokenizer.add_tokens(list(tokens))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if ids != list(range(ids[0], ids[0] + len(tokens))):
        raise InputError(
            f"the tokenizer gives added tokens the ids {ids}, which are not consecutive"
        )
    return ids[0], ids[0] + len(tokens)


def known_rows(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, int]:
    """Return the range (start, stop) of the ids of tokens that a tokenizer knows.

    Args:
      tokenizer: of transformers.
      tokens: one or more, in any order.

    Raises:
      InputError: a token is unknown, or their ids have gaps.
    """
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            raise InputError(f"the tokenizer has no token {token!r} to train")
    ids = sorted({known[token] for token in tokens})
    if ids[-1] - ids[0] >= len(ids):
        raise InputError(
            f"the tokens {', '.join(tokens)} have the ids {ids}, and rows train only "
            "as one run of ids: train fewer of them, or the whole table in full"
        )
    return ids[0], ids[-1] + 1


def grown_config(config: DecoderConfig, rows: tuple[int, int]) -> DecoderConfig:
    """Return the config of a model with rows for new tokens; spare rows are used first.

    Args:
      config: of the model before.
      rows: (start, stop) of the new tokens' ids.

    Raises:
      InputError: the model has fewer rows than the tokenizer had tokens.
    """
    start, stop = rows
    if start > config.vocab_size:
        raise InputError(
            f"the tokenizer has {start} tokens, but the model only "
            f"{config.vocab_size} rows for them: they do not belong to one model"
        )
    return dataclasses.replace(config, vocab_size=max(config.vocab_size, stop))


def grow(
    params: Mapping[str, Any], rows: tuple[int, int], shardings: Any = None
) -> dict[str, Any]:
    """Add rows to the embedding, and to an untied head: the mean of the rows before.

    Args:
      params: the tree of parameters, as loaded.
      rows: (start, stop) of the new tokens' ids.
      shardings: of the grown tree, or None.
    """
    flat = paths.flatten(params)
    placed = paths.flatten(shardings) if shardings else {}
    for path, axis in TOKEN_AXES.items():
        if path in flat:
            grown = jax.jit(
                _grown, static_argnums=(1, 2), out_shardings=placed.get(path)
            )
            flat[path] = grown(flat[path], rows, axis)
    return paths.unflatten(flat)


def _grown(leaf: jax.Array, rows: tuple[int, int], axis: int) -> jax.Array:
    start, stop = rows
    size = leaf.shape[axis]
    old = lax.slice_in_dim(leaf, 0, start, axis=axis)
    mean = jnp.mean(old.astype(jnp.float32), axis, keepdims=True).astype(leaf.dtype)
    new = jnp.repeat(mean, stop - start, axis)
    rest = lax.slice_in_dim(leaf, min(stop, size), size, axis=axis)
    return jnp.concatenate([old, new, rest], axis)
