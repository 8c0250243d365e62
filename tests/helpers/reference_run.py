"""How the runs beside the float64 reference are trained: rates, decay and clipping."""

from __future__ import annotations

import numpy as np
import optax

from tests.helpers.reference import ADAM_EPSILON, B1, B2
from tsd_jax.training.optimizer import make_optimizer, make_schedule

GAMMAS = {"up/kernel": 6.0 / 3, "down/kernel": 3.0 / np.sqrt(4)}
WARMUP = 2
PEAK, GAIN_PEAK, CLIP, DECAY = 0.02, 0.05, 0.3, 0.1


def reference_optimizer(steps: int) -> optax.GradientTransformation:
    """Return the optimizer that the equations follow."""
    return make_optimizer(
        make_schedule(PEAK, steps=steps, warmup=WARMUP),
        make_schedule(GAIN_PEAK, steps=steps, warmup=WARMUP),
        b1=B1,
        b2=B2,
        eps=ADAM_EPSILON,
        weight_decay=DECAY,
        clip_norm=CLIP,
    )
