"""Settings of PEFT's `LoraConfig`, drawn from a seed, on small bases of every family.

They vary what published adapters vary, and in combinations that nobody has tried.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.helpers import decoders, encoders

Values = dict[str, Any]


def _small(published: Mapping[str, Any], **more: Any) -> Values:
    """Return the config.json of two layers."""
    small = {**published, "num_hidden_layers": 2, **more}
    for name in ("layer_types", "no_rope_layers"):
        if name in small:
            small[name] = small[name][:2][::-1]
    if "sliding_window_pattern" in small:
        small["sliding_window_pattern"] = 2
    return small


# {name: config.json}: every decoder tied and untied, every encoder.
BASES: Mapping[str, Values] = {
    f"{name}{' tied' if tied else ''}": _small(each, tie_word_embeddings=tied)
    for name, each in decoders.PUBLISHED.items()
    for tied in (False, True)
} | {name: _small(each) for name, each in encoders.PUBLISHED.items()}


class Modules(NamedTuple):
    """Names of a torch model's modules.

    Attributes:
      linear: its linear modules.
      embeddings: its embeddings of tokens.
      norms: its norms.
      stacked: whether it has experts, as parameters.
      encoder: whether it classifies.
      tied: whether its head is its embedding.
    """

    linear: tuple[str, ...]
    embeddings: tuple[str, ...]
    norms: tuple[str, ...]
    stacked: bool
    encoder: bool
    tied: bool


class Saving(NamedTuple):
    """How PEFT saves an adapter.

    Attributes:
      embeddings: `save_embedding_layers`.
      half: whether its tensors are stored in bfloat16.
    """

    embeddings: bool | str
    half: bool


def draw_base(seed: int) -> str:
    """Return the name of a draw's base.

    Args:
      seed: of the draw.
    """
    return list(BASES)[seed % len(BASES)]


def draw(seed: str, modules: Modules) -> tuple[Values, Saving]:
    """Return arguments of `LoraConfig`, and how the adapter is saved.

    Args:
      seed: of the draw.
      modules: of its base.
    """
    rng = random.Random(seed)
    drawn = {
        **_targets(rng, modules),
        **_sizes(rng, modules),
        **_full(rng, modules),
        **_kinds(rng, modules),
    }
    embeddings = rng.choice(["auto", "auto", True, False])
    return drawn, Saving(embeddings, rng.random() < 0.08)


def _chance(rng: random.Random, share: float, values: Values) -> Values:
    return values if rng.random() < share else {}


def _some(rng: random.Random, names: Any, most: int = 4) -> list[str]:
    names = sorted({*names})
    return rng.sample(names, rng.randint(1, min(most, len(names))))


def _last(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[-parts:])


def _targets(rng: random.Random, modules: Modules) -> Values:
    """Draw which modules, layers and parameters have LoRA."""
    layer = rng.choice(["0", "1", "(0|1)", r"\d+"])
    last = [_last(name) for name in modules.linear]
    drawn: Values = {
        "target_modules": rng.choice(
            [
                _some(rng, last),
                _some(rng, last),
                _some(rng, [_last(name, 2) for name in modules.linear]),
                _some(rng, modules.linear),
                rf".*\.{layer}\..*({'|'.join(_some(rng, last))})",
                rf".*\.({'|'.join(_some(rng, last))})",
                "all-linear",
                "all-linear",
            ]
        )
    }
    if isinstance(drawn["target_modules"], list):
        layers = rng.choice([0, 1, [0], [1], [0, 1]])
        drawn |= _chance(rng, 0.2, {"layers_to_transform": layers})
        if rng.random() < 0.12:
            drawn["target_modules"] += _some(rng, map(_last, modules.embeddings))
    if "layers_to_transform" in drawn:
        pattern = "layer" if modules.encoder else "layers"
        drawn |= _chance(rng, 0.5, {"layers_pattern": rng.choice([pattern, [pattern]])})
    excluded = rng.choice(
        [_some(rng, last, 2), _some(rng, modules.linear, 2), r".*\.1\..*"]
    )
    drawn |= _chance(rng, 0.15, {"exclude_modules": excluded})
    return drawn | _parameters(rng, modules)


def _parameters(rng: random.Random, modules: Modules) -> Values:
    if modules.stacked and rng.random() < 0.6:
        names = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
        return {"target_parameters": _some(rng, names)}
    plain = [f"{_last(name, 2)}.weight" for name in modules.linear]
    return _chance(rng, 0.03, {"target_parameters": _some(rng, plain, 2)})


def _pattern(rng: random.Random, modules: Modules) -> str:
    """Draw a key of `rank_pattern` or `alpha_pattern`."""
    name = rng.choice(modules.linear)
    return rng.choice(
        [
            _last(name),
            _last(name, 2),
            name,
            f"^{name}",
            rf".*\.{rng.choice('01')}\..*",
            rf"{rng.choice('01')}\..*{_last(name)}",
            rf".*{_last(name)[1:]}",
        ]
    )


def _sizes(rng: random.Random, modules: Modules) -> Values:
    """Draw ranks and scales."""

    def patterns(values: list[Any]) -> Values:
        count = rng.randint(1, 3)
        return {_pattern(rng, modules): rng.choice(values) for _ in range(count)}

    return {
        "r": rng.choice([1, 2, 3, 4, 8, rng.choice([8, 40])]),
        "lora_alpha": rng.choice([1, 2, 3, 5, 16, 2.5]),
        "lora_dropout": rng.choice([0.0, 0.0, 0.1]),
        **_chance(rng, 0.3, {"rank_pattern": patterns([1, 2, 4])}),
        **_chance(rng, 0.3, {"alpha_pattern": patterns([1, 3, 7, 0.5])}),
    }


def _full(rng: random.Random, modules: Modules) -> Values:
    """Draw what trains in full, and whether tied matrices stay so."""
    embeddings = [_last(name) for name in modules.embeddings]
    saved = rng.choice(
        [
            ["lm_head"],
            embeddings,
            [*embeddings, "lm_head"],
            _some(rng, map(_last, modules.norms), 2),
            _some(rng, modules.norms, 2),
            _some(rng, map(_last, modules.linear), 2),
        ]
    )
    rows = [rng.sample(range(60), rng.randint(1, 4)) for _ in range(2)]
    listed: Any = rng.choice(
        [
            rows[0],
            {embeddings[0]: rows[0]},
            {"lm_head": rows[0]},
            {embeddings[0]: rows[0], "lm_head": rows[0]},
            {embeddings[0]: rows[0], "lm_head": rows[1]},
        ]
    )
    if modules.encoder:
        listed = {embeddings[0]: rows[0]}
    return {
        **_chance(rng, 0.22, {"modules_to_save": [*saved]}),
        **_chance(rng, 0.18, {"trainable_token_indices": listed}),
        **_chance(rng, 0.4 if modules.tied else 0.1, {"ensure_weight_tying": True}),
    }


def _kinds(rng: random.Random, modules: Modules) -> Values:
    """Draw what kind of LoRA it is."""
    start = rng.choice([False, "gaussian", "orthogonal"])
    task = "SEQ_CLS" if modules.encoder else rng.choice(["CAUSAL_LM", None])
    bias = rng.choice(["all", "lora_only"])
    return {
        "task_type": task,
        **_chance(rng, 0.2, {"use_dora": True}),
        **_chance(rng, 0.3, {"use_rslora": True}),
        **_chance(rng, 0.2, {"init_lora_weights": start}),
        **_chance(rng, 0.06, {"bias": bias}),
        **_chance(rng, 0.03, {"lora_bias": True}),
        **_chance(rng, 0.05, {"fan_in_fan_out": True}),
    }
