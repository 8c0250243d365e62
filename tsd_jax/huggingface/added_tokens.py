"""Tokens added to a tokenizer, and the rows that a model grows for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from tsd_jax.core.errors import InputError
from tsd_jax.models.config import DecoderConfig

ROWS = {"embed_tokens/embedding": 0, "lm_head/kernel": 1}
"""{parameter with a row for each token: the axis along which they lie}."""


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, int]:
    """Add tokens to a tokenizer, in order; give the range (start, stop) of their ids.

    Raises:
      InputError: a token is empty, given twice or known already.
    """
    known = tokenizer.get_vocab()
    for number, token in enumerate(tokens):
        if not isinstance(token, str) or not token:
            raise InputError(f"added token {token!r} is no text: name tokens as text")
        if token in known or token in tokens[:number]:
            raise InputError(
                f"the tokenizer has token {token!r} already: name new tokens, once each"
            )
    tokenizer.add_tokens(list(tokens))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if ids != list(range(ids[0], ids[0] + len(tokens))):
        raise InputError(
            f"the tokenizer gives added tokens the ids {ids}, which are not in a row"
        )
    return ids[0], ids[0] + len(tokens)


def grown_config(config: DecoderConfig, rows: tuple[int, int]) -> DecoderConfig:
    """Return the config of a model with these rows; spare rows it has are taken first.

    Raises:
      InputError: the model has fewer rows than the tokenizer had tokens.
    """
    start, stop = rows
    if start > config.vocab_size:
        raise InputError(
            f"the tokenizer has {start} tokens and the model only {config.vocab_size} "
            "rows for them: they are not of one model"
        )
    return dataclasses.replace(config, vocab_size=max(config.vocab_size, stop))


def grow(
    params: Mapping[str, Any], rows: tuple[int, int], shardings: Any = None
) -> dict[str, Any]:
    """Return the embedding, and an untied head, new rows at the mean of those before.

    Args:
      params: the tree of parameters, as loaded.
      rows: (start, stop) of the new tokens.
      shardings: of the grown tree, or None.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    places = traverse_util.flatten_dict(shardings, sep="/") if shardings else {}
    for path, axis in ROWS.items():
        if path in flat:
            grown = jax.jit(
                _grown, static_argnums=(1, 2), out_shardings=places.get(path)
            )
            flat[path] = grown(flat[path], rows, axis)
    return traverse_util.unflatten_dict(flat, sep="/")


def _grown(leaf: jax.Array, rows: tuple[int, int], axis: int) -> jax.Array:
    start, stop = rows
    size = leaf.shape[axis]
    old = lax.slice_in_dim(leaf, 0, start, axis=axis)
    mean = jnp.mean(old.astype(jnp.float32), axis, keepdims=True).astype(leaf.dtype)
    new = jnp.repeat(mean, stop - start, axis)
    rest = lax.slice_in_dim(leaf, min(stop, size), size, axis=axis)
    return jnp.concatenate([old, new, rest], axis)
