"""Fine-tune an NNX model of your own along its task-specific directions.

    python examples/nnx_training.py [FOLDER]

Its steps, launch, log and checkpoints are those of the library's own trainer; an
interrupted run resumes from the newest checkpoint in FOLDER.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tsd_jax as tsd
from tsd_jax.training.checkpoint import Checkpoints
from tsd_jax.training.loop import LoopCallbacks, LoopConfig, run
from tsd_jax.training.recorder import Recorder
from tsd_jax.training.state import create_state
from tsd_jax.training.step import launch_state, make_train_step

STEPS, LAUNCH = 30, 10


class Mlp(nnx.Module):
    """A model of two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        """Map (..., 8) to (..., 4)."""
        return self.down(jnp.tanh(self.up(x)))


def loss_fn(model, batch):
    """Return the summed squared error and the number of examples."""
    losses = (model(batch["x"]) - batch["y"]) ** 2
    return jnp.sum(losses), jnp.asarray(len(batch["x"]))


def batch(step):
    """Return one batch: (micro-batches, examples, features)."""
    x = np.random.default_rng(step).normal(size=(2, 64, 8)).astype("f4")
    return {"x": x, "y": np.sin(2 * x[..., :4])}


def main(folder: Path) -> None:
    """Train the model, and print its loss."""
    model = Mlp(nnx.Rngs(0))
    params = tsd.nnx.params(model)
    rules = [tsd.Rule(pattern=r"(up|down)/kernel", rank=2, directions=3)]
    spec = tsd.nnx.make_spec(model, rules, jnp.zeros((1, 8)), method="tsd")
    rates = {name: tsd.make_schedule(0.05, steps=STEPS) for name in ("lora", "gain")}
    optimizer = tsd.make_optimizer(*rates.values())
    callbacks = LoopCallbacks(
        step=make_train_step(loss_fn, tsd.nnx.make_bind(model), optimizer),
        launch=partial(launch_state, params=params, spec=spec),
        batch=batch,
        evaluate=lambda state: {},
        on_launch=lambda report: None,
        rates=rates,
    )
    plan = LoopConfig(steps=STEPS, launch_step=LAUNCH, log_every=5, checkpoint_every=10)
    with Checkpoints(folder / "checkpoints") as saved:
        state = create_state(jax.random.key(1), spec, optimizer)
        state = state if saved.latest is None else saved.restore(state)
        begun, launched = int(state.step), bool(state.launched)
        with Recorder(folder, steps=STEPS, start=begun, launched=launched) as log:
            run(state, params, jax.random.key(2), callbacks, plan, log, saved)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
