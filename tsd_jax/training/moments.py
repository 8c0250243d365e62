"""What launch resets in an optimizer's state: moments restart, schedules continue.

Before launch the gains' gradients are exactly zero (L = R = 0), so they move nothing
and add nothing to the clipping norm. But a count such as Adam's must not continue past
launch: bias correction would take the gains' first gradients for the end of a long run
of zeros and more than double the update. Moments of the old A and B do not apply to the
new ones either. So the state of every group that launch restarts becomes its initial
state, except for the counts that schedules read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.leaves import GROUPS
from tsd_jax.core.methods import Method
from tsd_jax.training.optimizer import group_labels

WRAPPERS = {
    "ApplyIfFiniteState": "inner_state",
    "ConditionallyMaskState": "inner_state",
    "ConditionallyTransformState": "inner_state",
    "InjectHyperparamsState": "inner_state",
    "InjectStatefulHyperparamsState": "inner_state",
    "MaskedState": "inner_state",
    "MultiStepsState": "inner_opt_state",
    "SplitRealAndImaginaryState": "inner_state",
}
"""optax's states around another state, and the field of that one; the rest stays."""

CLOCKS = {
    "AddNoiseState",
    "DifferentiallyPrivateAggregateState",
    "MonitorState",
    "ReduceLROnPlateauState",
    "ScaleByScheduleState",
    "SnapshotState",
    "WrappedScheduleState",
    "ZeroNansState",
}
"""optax's states of schedules, random keys and monitors, which continue."""

ZERO_MOMENTS = {
    "EmaState",
    "FactoredState",
    "MuonState",
    "ScaleByAdaDeltaState",
    "ScaleByAdamState",
    "ScaleByAdanState",
    "ScaleByAdemamixState",
    "ScaleByAmsgradState",
    "ScaleByBeliefState",
    "ScaleByLionState",
    "ScaleByNovogradState",
    "ScaleBySM3State",
    "ScaleBySimplifiedAdEMAMixState",
    "TraceState",
}
"""optax's moments, with the counts that belong to them, that start at zero."""

SET_MOMENTS = {
    "ScaleByOptimisticGradientState",
    "ScaleByRStdDevState",
    "ScaleByRStdDevWithCountState",
    "ScaleByRmsState",
    "ScaleByRmsWithCountState",
    "ScaleByRpropState",
    "ScaleByRssState",
}
"""optax's moments that start at a value which only the optimizer knows."""

CONSTANTS = {"MuonState": ("ns_coeffs",)}
"""Fields of moments that never change."""


@dataclass(frozen=True)
class _Scope:
    """What restarts, and where in the state the walk is.

    Attributes:
      groups: names of the restarted groups, as `group_labels` has them.
      partition: the same groups as the partition names them.
      inside: the group that the walk is in, as the partition names it; None outside.
    """

    groups: frozenset[str]
    partition: frozenset[str]
    inside: str | None = None


def reset_moments(
    opt_state: optax.OptState,
    method: Method,
    labels: Mapping[str, str] | None = None,
    *,
    initial: optax.OptState | None = None,
) -> optax.OptState:
    """Return an optimizer's state with the moments of what launch restarts reset.

    `dash` resets the gains (their count has run), `init` and `tsd` A, B and m as well;
    full parameters continue. All moments restart, with their own counts, and so do
    gradients that `optax.MultiSteps` has accumulated since its last update; the counts
    of schedules continue. Types and shardings stay.

    Args:
      opt_state: state of an optimizer with an `optax.partition` over `group_labels`
        anywhere in its chain.
      method: the method that launched.
      labels: names of the groups "lora" and "gain" in a partition of your own.
      initial: `optimizer.init(trainable)`, which moments restart from; None restarts
        them from zero. RMSprop, Adagrad, Rprop and optimistic gradients need it; so
        does Yogi, whose state cannot be told from Adam's.

    Raises:
      InputError: there is no partition with these groups, or a state cannot be reset.
    """
    groups = frozenset(group.name for group in GROUPS if group.resets(method))
    names = {name: name for name in groups} | dict(labels or {})
    scope = _Scope(groups, frozenset(names[name] for name in groups))
    if not _has_partition(opt_state, scope):
        raise InputError(
            f"the optimizer state has no optax.partition with the groups "
            f"{sorted(scope.partition)}; label them with tsd_jax.group_labels"
        )
    if initial is not None and not _alike(opt_state, initial):
        raise InputError(
            "reset_moments: initial is not a state of the same optimizer; pass "
            "initial=optimizer.init(trainable)"
        )
    return _restart(opt_state, initial, scope)


def _is_own(node: Any, scope: _Scope) -> bool:
    """Return whether a state is the partition over the groups."""
    is_partition = isinstance(node, optax.transforms.PartitionState)
    return is_partition and scope.partition <= set(node.inner_states)


def _has_partition(opt_state: optax.OptState, scope: _Scope) -> bool:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: _is_own(node, scope))
    return any(_is_own(node, scope) for node in nodes)


def _alike(state: optax.OptState, initial: optax.OptState) -> bool:
    """Return whether two states have the same structure and shapes."""
    if jax.tree.structure(state) != jax.tree.structure(initial):
        return False
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(initial), strict=True)
    return all(jnp.shape(old) == jnp.shape(new) for old, new in pairs)


def _kind(node: Any) -> str:
    """Return the name of optax's type of a state; "" for other types."""
    own = type(node).__module__.partition(".")[0] == "optax"
    return type(node).__name__ if own else ""


def _restart(node: Any, initial: Any, scope: _Scope) -> Any:
    """Return a state, restarted where it belongs to a restarted group."""
    kind = _kind(node)
    if isinstance(node, optax.transforms.PartitionState):
        return _restart_partition(node, initial, scope)
    if kind in WRAPPERS:
        return _restart_wrapper(node, initial, scope)
    if kind in ZERO_MOMENTS | SET_MOMENTS:
        return _restart_moments(node, initial, scope)
    if kind in CLOCKS or not jax.tree.leaves(node):
        return node
    if type(node) in (tuple, list):
        news = [None] * len(node) if initial is None else initial
        pairs = zip(node, news, strict=True)
        return type(node)(_restart(old, new, scope) for old, new in pairs)
    if isinstance(node, dict):
        new = dict.fromkeys(node) if initial is None else initial
        return type(node)((key, _restart(node[key], new[key], scope)) for key in node)
    if not _concerned(node, scope):
        return node
    raise InputError(
        f"launch cannot reset the optimizer state {type(node).__qualname__} of the "
        f"groups {sorted(scope.partition)}: its moments are unknown; use another "
        "optimizer for these groups"
    )


def _restart_partition(node: Any, initial: Any, scope: _Scope) -> Any:
    """Restart the groups of the partition, or go through one that is not it."""
    own = scope.inside is None and _is_own(node, scope)
    new = None if initial is None else initial.inner_states

    def group(name: Any, state: Any) -> Any:
        if own and name not in scope.partition:
            return state
        within = replace(scope, inside=name) if own else scope
        return _restart(state, None if new is None else new[name], within)

    inner = {name: group(name, state) for name, state in node.inner_states.items()}
    return node._replace(inner_states=inner)


def _restart_wrapper(node: Any, initial: Any, scope: _Scope) -> Any:
    """Restart the state in a wrapper, and an accumulation that is under way."""
    field = WRAPPERS[_kind(node)]
    new = None if initial is None else getattr(initial, field)
    node = node._replace(**{field: _restart(getattr(node, field), new, scope)})
    if _kind(node) == "MultiStepsState" and _concerned(node.acc_grads, scope):
        # A mean over fewer gradients than are counted would be too small, so what
        # the other leaves have accumulated is dropped too.
        again = (node.mini_step, node.acc_grads)
        step, gradients = jax.tree.map(jnp.zeros_like, again)
        return node._replace(mini_step=step, acc_grads=gradients)
    return node


def _restart_moments(node: Any, initial: Any, scope: _Scope) -> Any:
    """Restart moments and their counts, but for constants beside them."""
    kind = _kind(node)
    if not _concerned(node, scope):
        return node
    if initial is None and kind in SET_MOMENTS:
        raise InputError(
            f"optax's {kind} does not start at zero: pass reset_moments "
            "initial=optimizer.init(trainable), or launch_state the optimizer"
        )
    fields = [name for name in node._fields if name not in CONSTANTS.get(kind, ())]
    renew = _restart_leaves if scope.inside is None else _restart_all
    return node._replace(
        **{
            name: renew(
                getattr(node, name),
                None if initial is None else getattr(initial, name),
                scope,
            )
            for name in fields
        }
    )


def _restart_all(field: Any, initial: Any, scope: _Scope) -> Any:
    """Return a field of moments as it starts."""
    del scope
    if initial is None:
        return jax.tree.map(jnp.zeros_like, field)
    return jax.tree.map(_like, initial, field)


def _restart_leaves(field: Any, initial: Any, scope: _Scope) -> Any:
    """Restart the leaves of the restarted groups, outside of the partition."""
    if not any(map(_is_trainable, _nodes(field))):
        raise InputError(
            "the optimizer keeps moments of all groups outside of its optax.partition, "
            "with one count, so launch cannot reset some of them; move that transform "
            "into each group of the partition"
        )

    def restart_leaf(label: str, old: Any, new: Any = None) -> Any:
        return _restart_all(old, new, scope) if label in scope.groups else old

    def restart_tree(node: Any, *new: Any) -> Any:
        if not _is_trainable(node):
            return node
        return jax.tree.map(restart_leaf, group_labels(node), node, *new)

    trees = [field] if initial is None else [field, initial]
    return jax.tree.map(restart_tree, *trees, is_leaf=_is_trainable)


def _like(new: Any, old: Any) -> Any:
    """Return a new array with the type and the sharding of an old one."""
    new = jnp.asarray(new, old.dtype)
    if isinstance(old, Tracer) or new.sharding == old.sharding:
        return new
    return jax.device_put(new, old.sharding)


def _is_trainable(node: Any) -> bool:
    return isinstance(node, Trainable)


def _nodes(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_trainable)


def _concerned(state: Any, scope: _Scope) -> bool:
    """Return whether a state holds something of a restarted group.

    Outside of the partition that is where a Trainable in it has such leaves.
    """
    if scope.inside is not None:
        return True
    trainables = filter(_is_trainable, _nodes(state))
    return any(_has_restarted(node, scope) for node in trainables)


def _has_restarted(node: Trainable, scope: _Scope) -> bool:
    """Return whether a tree like what trains has leaves of a restarted group."""
    count = jax.tree.map(
        lambda label, leaf: label in scope.groups and bool(jax.tree.leaves(leaf)),
        group_labels(node),
        node,
    )
    return any(jax.tree.leaves(count))
