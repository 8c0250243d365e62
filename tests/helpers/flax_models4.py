"""`python -m tests.helpers.flax_models4`: Flax models of transformers 4, adapted.

Prints a line of JSON for each model: the kernels that are adapted; the largest
difference to the base at the start, and that of the bound and the merged model along
launched directions, relative to what random adapters change. Needs a transformers 4 in
PYTHONPATH.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

import tsd_jax as tsd
from tests.helpers.trees import random_all, trained

SIZES = {"vocab_size": 67, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
# {name of the model: (its config, fields)}.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "FlaxGPT2LMHeadModel": ("GPT2Config", GPT),
    "FlaxBertForSequenceClassification": ("BertConfig", BERT),
    "FlaxLlamaForCausalLM": ("LlamaConfig", BERT),
    "FlaxGemmaForCausalLM": (
        "GemmaConfig",
        BERT | {"num_key_value_heads": 1, "head_dim": 8},
    ),
}
RULES = [tsd.Rule(pattern=r".*/kernel", rank=2, directions=2)]


def adapt(name: str) -> dict[str, Any]:
    """Adapt every kernel of a small random model, launch and merge it."""
    config, fields = MODELS[name]
    made = getattr(transformers, config)(**SIZES, **fields)
    model = getattr(transformers, name)(made, seed=0)
    tokens = jnp.arange(3, 19).reshape(2, 8) % 67
    variables = {"params": model.params}

    def apply(variables: Any, tokens: jax.Array) -> jax.Array:
        return model(tokens, params=variables["params"]).logits

    spec = tsd.make_spec(apply, variables, RULES, tokens, method="tsd")
    run = tsd.adapted(apply)

    def bound(pair: Any) -> jax.Array:
        return run({"params": tsd.bind(model.params, *pair)}, tokens)

    base = apply(variables, tokens)
    first = bound(tsd.init(jax.random.key(0), spec))
    learned = trained(0, spec, 0.3)[0]
    _, directions, _ = tsd.launch(model.params, learned, spec)
    pair = random_all(0, spec)[0], directions
    merged = apply({"params": tsd.merge(model.params, *pair)}, tokens)
    change = np.abs(merged - base).max()
    return {
        "model": name,
        "kernels": len(spec.paths),
        "start": float(np.abs(first - base).max()),
        "bound": float(np.abs(bound(pair) - merged).max() / change),
        "change": float(change),
    }


def main() -> None:
    for name in MODELS:
        print(json.dumps(adapt(name)), flush=True)


if __name__ == "__main__":
    main()
