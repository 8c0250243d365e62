"""What the training loop calls, each made of exactly what it uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from tsd_jax.app.evaluation import Evaluate, Figures
from tsd_jax.app.report import on_host
from tsd_jax.binding.linen import bind_variables
from tsd_jax.core.spec import Spec
from tsd_jax.core.types import LossFn, Progress
from tsd_jax.extraction.launch import Extraction, Ranking
from tsd_jax.storage.directions_file import write_rankings
from tsd_jax.storage.run_files import DIRECTIONS
from tsd_jax.training import sharding
from tsd_jax.training.auto_launch import AutoLaunchConfig, DirectionMonitor
from tsd_jax.training.gradient_discovery import KernelGradients
from tsd_jax.training.state import TrainState
from tsd_jax.training.step import launch_state, make_train_step

Report = Mapping[str, Ranking]
"""{kernel path: what launch ranked}."""


@dataclass(frozen=True)
class Shardings:
    """Where arrays lie.

    Attributes:
      params: of the base.
      state: of the training state.
    """

    params: Any
    state: Any


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    spec: Spec,
    shardings: Shardings,
    mesh: Mesh,
) -> Any:
    """Return the jitted step, its arrays pinned to their shardings."""
    return make_train_step(
        loss_fn,
        bind_variables,
        optimizer,
        dropout=any(kernel.dropout > 0 for kernel in spec.kernels),
        state_shardings=shardings.state,
        param_shardings=shardings.params,
        batch_shardings=NamedSharding(mesh, sharding.BATCH),
    )


class SettleCheck:
    """The check whether directions have settled: state -> state with one more check.

    The monitor and the spectra it holds are made at the first check.

    Args:
      params: the base's tree.
      spec: of `make_spec`.
      config: when directions count as settled; None where nothing is ever checked.
      epsilon: of the change rate.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        spec: Spec,
        config: AutoLaunchConfig | None,
        epsilon: float,
    ):
        self._params, self._spec = params, spec
        self._config, self._epsilon = config, epsilon
        self._monitor: DirectionMonitor | None = None

    def __call__(self, state: TrainState) -> TrainState:
        """Check the directions once."""
        if self._monitor is None:
            assert self._config is not None
            self._monitor = DirectionMonitor(
                self._params, self._spec, self._config, epsilon=self._epsilon
            )
        return state.replace(monitor=self._monitor(state.monitor, state.trainable))

    def release(self) -> None:
        """Free the spectra: after the launch there is nothing to check."""
        self._monitor = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The launch: state -> (state, what was ranked).

    Attributes:
      params: the base's tree.
      spec: of `make_spec`.
      epsilon: of the change rate.
      seed: of methods that draw directions.
      extraction: how directions are extracted.
      gradient_batches: of the gradient to rank; 0 to rank pre-launch's change.
      loss_fn: whose gradient that is.
      batch: step -> batch.
      progress: called with matrices done and their number.
      shardings: of the training state.
      release: called first, to free memory.
    """

    params: Mapping[str, Any]
    spec: Spec
    epsilon: float
    seed: int
    extraction: Extraction
    gradient_batches: int
    loss_fn: LossFn
    batch: Callable[[int], Mapping[str, Any]]
    progress: Progress
    shardings: Any
    release: Callable[[], None]

    def __call__(self, state: TrainState) -> tuple[TrainState, Report]:
        """Launch between two steps."""
        self.release()
        return launch_state(
            state,
            self.params,
            self.spec,
            epsilon=self.epsilon,
            seed=self.seed,
            deltas=self._gradients(state) if self.gradient_batches else None,
            extraction=self.extraction,
            progress=self.progress,
            state_shardings=self.shardings,
        )

    def _gradients(self, state: TrainState) -> KernelGradients:
        """Return the gradients of the loss over the batches that come next."""
        start = int(state.step)
        batches: Sequence[Mapping[str, Any]] = [
            self.batch(step) for step in range(start, start + self.gradient_batches)
        ]
        return KernelGradients(
            self.loss_fn, bind_variables, state, self.params, self.spec, batches
        )


def rankings_writer(workdir: Path) -> Callable[[Report], None]:
    """Return the function that writes what a launch ranked into a run's folder."""

    def write(report: Report) -> None:
        here = on_host(report)
        if jax.process_index() == 0:
            write_rankings(workdir / DIRECTIONS, here)

    return write


def state_evaluation(
    evaluate: Evaluate | None, params: Mapping[str, Any]
) -> Callable[[TrainState], Figures]:
    """Return the function that scores the base with a state's adapters.

    Args:
      evaluate: variables -> figures; None where there are none.
      params: the base's tree.
    """

    def evaluate_state(state: TrainState) -> Figures:
        if evaluate is None:
            return {}
        return evaluate(bind_variables(params, state.trainable, state.directions))

    return evaluate_state
