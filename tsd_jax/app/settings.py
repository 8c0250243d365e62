"""The settings of a run: one frozen dataclass a section of configs/default.py.

What each key is, and its default, stands in configs/default.py alone. The range of a
number is declared with its type; it and the rules between keys are checked when the
dataclasses are made, before any model or data is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full
from tsd_jax.core.methods import Method, get_method
from tsd_jax.core.quantization import Quantization
from tsd_jax.core.ranges import (
    Amount,
    Count,
    Limit,
    Positive,
    Proportion,
    Range,
    Share,
    check_ranges,
)
from tsd_jax.core.spec import DirectionCount, Rule
from tsd_jax.evaluation.generation import Generation
from tsd_jax.extraction.launch import check_deltas
from tsd_jax.training.auto_launch import AutoLaunchConfig, Threshold


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The section `model`."""

    path: str
    revision: str
    dtype: str
    quantization: str
    quantization_tile: Limit
    scan_layers: bool
    remat: bool
    new_head: bool
    added_tokens: tuple[str, ...]

    def __post_init__(self):
        """Refuse settings that name no model, or a base that cannot be held."""
        check_ranges(self, "model.")
        if not self.path:
            raise InputError("model.path is empty; name a folder or a hub id")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"model.dtype {self.dtype!r} must be float32 or bfloat16")
        if self.quantization_tile and not self.quantization:
            raise InputError("model.quantization_tile needs a model.quantization")
        if self.base_quantization() and not self.remat:
            raise InputError(
                f"model.quantization={self.quantization!r} without model.remat=True "
                "would keep the kernels of all layers as floats for the gradient: add "
                "--config.model.remat=True"
            )

    def base_quantization(self) -> Quantization | None:
        """Return how the base's linear layers are quantized; None if they are not."""
        if not self.quantization:
            return None
        return Quantization(format=self.quantization, tile=self.quantization_tile)


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The section `method`."""

    name: str
    keep: bool
    ranking: str
    start: str
    launch_step: Limit
    epsilon: Positive
    discovery: str
    discovery_batches: Count
    auto_launch: bool

    def __post_init__(self):
        """Refuse keys that do not compose a method, or a launch it cannot make."""
        check_ranges(self, "method.")
        method = self.method()
        if self.discovery not in ("prelaunch", "gradient"):
            raise InputError(
                f"unknown method.discovery {self.discovery!r}; "
                "choose 'prelaunch' or 'gradient'"
            )
        if self.discovery == "gradient":
            self._check_gradient(method)
        if self.auto_launch:
            _check_auto_launch(method)
        elif self.launch_step == 0 and method.needs_delta and not self.gradient_batches:
            raise InputError(
                f"method.launch_step 0: method {method.name!r} finds its directions in "
                "what training has changed, so launch after at least 1 step (or with "
                "method.discovery='gradient')"
            )

    def method(self) -> Method:
        """Return the method, in the variant asked for."""
        return get_method(
            self.name,
            keep=self.keep,
            ranking=self.ranking or None,
            start=self.start or None,
        )

    @property
    def gradient_batches(self) -> int:
        """The number of batches whose gradient is ranked; 0 for pre-launch's change."""
        return self.discovery_batches if self.discovery == "gradient" else 0

    @property
    def fixed_launch_step(self) -> int | None:
        """The step of the launch; None where there is none, or it is not fixed."""
        launches = self.method().launches and not self.auto_launch
        return self.launch_step if launches else None

    def _check_gradient(self, method: Method) -> None:
        """Raise InputError unless a gradient can take the place of pre-launch."""
        if not method.launches:
            raise InputError(
                "method.discovery='gradient' has no meaning for method "
                f"{method.name!r}, which launches nothing"
            )
        check_deltas(method)
        if self.auto_launch:
            raise InputError(
                "method.auto_launch=True waits for what pre-launch changes to settle, "
                "but method.discovery='gradient' does not look at it; choose one of "
                "them"
            )


def _check_auto_launch(method: Method) -> None:
    """Raise InputError unless a method ranks by rates, which can settle."""
    if method.launches and method.ranking == "rates":
        return
    reason = f"ranks by {method.ranking!r}" if method.launches else "has no launch"
    raise InputError(
        f"method.auto_launch=True waits for change rates to settle, but method "
        f"{method.name!r} {reason}"
    )


@dataclass(frozen=True, kw_only=True)
class AutoLaunchSettings:
    """The section `auto_launch`; see `AutoLaunchConfig`."""

    launch_min: Count
    launch_max: Limit
    every: Count
    threshold: Threshold
    patience: Count
    matrices: Count

    def __post_init__(self):
        """Refuse numbers out of range."""
        check_ranges(self, "auto_launch.")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The section `adapter`."""

    pattern: str
    train_head: bool
    rank: Count
    alpha: Positive
    directions: DirectionCount
    auto_directions: bool
    dropout: Share
    scaling: str
    dora: bool
    full_params: str
    train_tokens: tuple[str, ...]
    start: str

    def __post_init__(self):
        """Refuse rules that no kernel or parameter could follow."""
        check_ranges(self, "adapter.")
        self.rule()
        self.full_rules()

    def rule(self) -> Rule:
        """Return the rule of the kernels to adapt."""
        return Rule(
            pattern=self.pattern,
            rank=self.rank,
            alpha=self.alpha,
            directions=self.directions,
            auto_directions=self.auto_directions,
            dropout=self.dropout,
            scaling=self.scaling,
            dora=self.dora,
        )

    def full_rules(self) -> list[Full]:
        """Return the rule of the parameters to train in full, if there is one."""
        return [Full(pattern=self.full_params)] if self.full_params else []


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The section `data`."""

    kind: str
    path: str
    eval_path: str
    held_out: Share
    problem: str
    positive: str
    template: str
    length: Count
    train_on_prompt: bool

    def __post_init__(self):
        """Refuse settings that name no data, or leave nothing to train on."""
        check_ranges(self, "data.")
        if not self.path:
            raise InputError("data.path is empty; name a data file")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The section `eval`."""

    metric: str
    answer: str
    batch_size: Count
    limit: Limit
    max_new_tokens: Count
    num_beams: Count
    temperature: Amount
    top_k: Limit
    top_p: Proportion
    stop: tuple[str, ...]
    every: Limit

    def __post_init__(self):
        """Refuse sizes and counts that mean nothing."""
        check_ranges(self, "eval.")
        self.generation()

    def generation(self, eos_ids: tuple[int, ...] = ()) -> Generation:
        """Return how prompts are continued."""
        names = ("max_new_tokens", "num_beams", "temperature", "top_k", "top_p", "stop")
        values = {name: getattr(self, name) for name in names}
        try:
            return Generation(**values, eos_ids=eos_ids)
        except InputError as error:
            raise InputError(f"eval.{error}") from error


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The section `optimizer`."""

    learning_rate: Amount
    gain_learning_rate: Amount
    full_learning_rate: Amount
    warmup: Limit
    decay: str
    restart: bool
    weight_decay: Amount
    clip_norm: Amount
    b1: Share
    b2: Share
    eps: Positive

    def __post_init__(self):
        """Refuse numbers an optimizer cannot use."""
        check_ranges(self, "optimizer.")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The section `train`."""

    steps: Count
    batch_size: Count
    micro_batches: Count
    log_every: Count
    checkpoint_every: Limit

    def __post_init__(self):
        """Refuse batches that cannot be accumulated, and counts that mean nothing."""
        check_ranges(self, "train.")
        if self.batch_size % self.micro_batches:
            raise InputError(
                f"train.batch_size {self.batch_size} must be a multiple of "
                f"train.micro_batches {self.micro_batches}"
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run; `settings_from` makes them."""

    seed: Annotated[int, Range(0, 2**32)]  # JAX's keys drop what is above
    mesh: tuple[Annotated[int, Range(1, also=(-1,))], ...]
    cache_dir: str
    cache_spectra: bool
    cache_spectra_gb: Positive
    check: bool
    model: ModelSettings
    method: MethodSettings
    auto_launch: AutoLaunchSettings
    adapter: AdapterSettings
    data: DataSettings
    eval: EvalSettings
    optimizer: OptimizerSettings
    train: TrainSettings

    def __post_init__(self):
        """Refuse sections that do not go together."""
        check_ranges(self)
        self.auto_launch_config()
        data = self.data
        if self.eval.every and not (data.eval_path or data.held_out):
            raise InputError(
                f"eval.every {self.eval.every} needs data to evaluate: give a "
                "data.eval_path, or hold out a share of data.path with data.held_out"
            )
        if self.optimizer.restart and self.method.fixed_launch_step is None:
            raise InputError(
                "optimizer.restart=True needs a launch whose step is known beforehand, "
                f"and method {self.method.name!r} has none here"
            )
        if self.cache_spectra and self.cache_dir == "off":
            raise InputError("cache_spectra needs a cache_dir, which is 'off'")

    def auto_launch_config(self) -> AutoLaunchConfig | None:
        """Return when directions count as settled; None if that decides nothing."""
        if not self.method.auto_launch:
            return None
        section = self.auto_launch
        return AutoLaunchConfig(
            launch_min=section.launch_min,
            launch_max=section.launch_max or self.train.steps // 2,
            every=section.every,
            threshold=section.threshold,
            patience=section.patience,
            matrices=section.matrices,
        )
