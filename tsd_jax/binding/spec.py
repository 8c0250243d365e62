"""From rules and what a trace of a model told to the spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tsd_jax.binding.calls import Handler
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, FullSpec, full_spec
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import Method, get_method
from tsd_jax.core.spec import Rule, Spec, build_spec, match_rules


def split_rules(
    params: Mapping[str, Any], rules: Sequence[Rule | Full]
) -> tuple[dict[str, Rule], tuple[FullSpec, ...]]:
    """Choose parameters by rules: ({kernel path: rule}, what trains whole).

    Args:
      params: {path: array or ShapeDtypeStruct}.
      rules: the first match wins.
    """
    chosen = match_rules(tuple(params), rules)
    whole = tuple(
        full_spec(path, params[path], rule)
        for path, rule in chosen.items()
        if isinstance(rule, Full)
    )
    return {p: rule for p, rule in chosen.items() if isinstance(rule, Rule)}, whole


def traced_spec(
    shapes: Mapping[str, tuple[int, ...]],
    matched: Mapping[str, Rule],
    layouts: Mapping[str, Layout],
    owners: Mapping[str, str],
    handlers: Mapping[type, Handler],
    method: str | Method,
    whole: tuple[FullSpec, ...],
) -> Spec:
    """Make the spec of matched kernels from what a trace of their model told.

    Args:
      shapes: {path: stored shape}.
      matched: {path: rule}.
      layouts: {path: layout} of the kernels used in the trace.
      owners: {module path: type name} of the modules that use or might use one.
      handlers: what each module type contracts.
      method: name, or of `get_method`.
      whole: what trains whole.

    Raises:
      InputError: a matched kernel has no layout; a rule's contradicts the traced one.
    """
    for path in matched:
        if path not in layouts:
            raise InputError(
                _unused(path, owners.get(path.rpartition("/")[0]), handlers)
            )
    chosen = {
        path: _overridden(path, rule, layouts[path]) if rule.layout else layouts[path]
        for path, rule in matched.items()
    }
    method = get_method(method) if isinstance(method, str) else method
    return build_spec(shapes, chosen, matched, method, whole)


def _unused(path: str, owner: str | None, handlers: Mapping[type, Handler]) -> str:
    names = {kind.__name__ for kind in handlers}
    known = ", ".join(sorted(names))
    if owner in names:
        return (
            f"{path} is no kernel of its {owner}; narrow the rule's pattern to kernels"
        )
    if owner:
        return (
            f"{path} belongs to a module of type {owner}, which has no low-rank path "
            f"(known: {known}); leave it out of the rules or train it whole; if it is "
            "contracted, give a handler or use this library's einsum"
        )
    return (
        f"{path} is matched by a rule, but no module uses it in this call of the "
        "model; leave it out of the rules, or trace a call that uses it"
    )


def _overridden(path: str, rule: Rule, traced: Layout) -> Layout:
    """Take a rule's layout; inputs and outputs may only become batch axes.

    The order of flattening permutes rows or columns of the matrix and nothing else:
    it is always the stored one, which the forward pass takes for granted.
    """
    wanted = rule.layout or traced
    inputs, outputs = tuple(sorted(wanted.inputs)), tuple(sorted(wanted.outputs))
    layout = Layout(wanted.batch, inputs, outputs, traced.lifted)
    fits = set(layout.inputs) <= set(traced.inputs)
    if not (fits and set(layout.outputs) <= set(traced.outputs)):
        raise InputError(
            f"{path}: the rule's {wanted} contradicts the module, which has "
            f"inputs {traced.inputs} and outputs {traced.outputs}"
        )
    if rule.dora and set(layout.inputs) != set(traced.inputs):
        raise InputError(
            f"{path}: the rule's layout stacks an axis the module contracts, and DoRA "
            "scales columns over all of the inputs; leave one of them out"
        )
    return layout
