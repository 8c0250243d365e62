"""A decoder in two parts, both with adapters, for losses that chunk its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from tsd_jax.binding.linen import adapted
from tsd_jax.evaluation.chunked_loss import SplitModel
from tsd_jax.models.decoder import Decoder, head_name, make_head


def split_decoder(network: Decoder) -> SplitModel:
    """Return a decoder in two parts that see adapters.

    Args:
      network: the decoder.
    """
    name, apply = head_name(network.config), adapted(network.apply)
    untied = not network.config.tie_word_embeddings

    def hidden(variables: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
        params = dict(variables["params"])
        if untied:
            del params[name]
        return apply({**variables, "params": params}, tokens, head=False)

    return SplitModel(
        hidden=hidden,
        head=adapted(make_head(network)),
        head_variables=lambda variables: {"params": {name: variables["params"][name]}},
        vocabulary=network.config.vocab_size,
    )
