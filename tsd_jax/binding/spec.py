"""From rules, and what a trace of the model tells, to the spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from tsd_jax.binding.follow import follow
from tsd_jax.binding.ledger import Ledger
from tsd_jax.binding.marks import Recorder, recording
from tsd_jax.binding.sites import Reader, Traced
from tsd_jax.binding.values import Param, identity
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, FullSpec, full_spec
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import Method, get_method
from tsd_jax.core.spec import Rule, Spec, build_spec, match_rules


def split_rules(
    params: Mapping[str, Any], rules: Sequence[Rule | Full]
) -> tuple[dict[str, Rule], tuple[FullSpec, ...]]:
    """Choose parameters by rules: ({kernel path: rule}, what trains in full).

    Args:
      params: {path: array or ShapeDtypeStruct}.
      rules: the first match wins.
    """
    if isinstance(rules, Rule | Full) or not all(
        isinstance(rule, Rule | Full) for rule in rules
    ):
        raise InputError(
            "rules are a list of tsd_jax.Rule and Full: [Rule(pattern=...)]"
        )
    chosen = match_rules(tuple(params), rules)
    full = tuple(
        full_spec(path, params[path], rule)
        for path, rule in chosen.items()
        if isinstance(rule, Full)
    )
    return {p: rule for p, rule in chosen.items() if isinstance(rule, Rule)}, full


def traced_spec(
    shapes: Mapping[str, tuple[int, ...]],
    matched: Mapping[str, Rule],
    traced: Mapping[str, Traced | None],
    method: str | Method,
    full: tuple[FullSpec, ...],
) -> Spec:
    """Return the spec of matched kernels, from what a trace of their model told.

    Args:
      shapes: {path: stored shape}.
      matched: {path: rule}.
      traced: {path: what the trace told}, None where no method uses the kernel.
      method: name, or of `get_method`.
      full: what trains in full.

    Raises:
      InputError: a matched kernel is not used; a rule's layout contradicts the traced
        one; DoRA is asked for where more than a bias is added to the contraction.
    """
    found = {path: _used(path, each) for path, each in traced.items()}
    layouts = {}
    for path, rule in matched.items():
        layout = found[path].layout
        layouts[path] = _overridden(path, rule, layout) if rule.layout else layout
        if rule.dora and any(site.more for site in found[path].sites):
            raise InputError(
                f"{path}: DoRA scales x K and not what is added to it, and its method "
                "adds more than one bias that lies beside the kernel; adapt it "
                "without DoRA"
            )
    method = get_method(method) if isinstance(method, str) else method
    spec = build_spec(shapes, layouts, matched, method, full)
    kernels = (
        dataclasses.replace(kernel, calls=found[kernel.path].sites)
        for kernel in spec.kernels
    )
    return dataclasses.replace(spec, kernels=tuple(kernels))


def _used(path: str, traced: Traced | None) -> Traced:
    if traced is None:
        raise InputError(
            f"{path} is matched by a rule, but no module uses it in this call of the "
            "model; leave it out of the rules, or trace a call that uses it"
        )
    return traced


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


def with_arrays_apart(
    function: Callable, *trees: Any
) -> tuple[Callable[[dict[int, Any]], Any], dict[int, Any]]:
    """Split a call into its arrays, to be traced, and everything else, as it is.

    Args:
      function: what is called.
      *trees: its arguments.

    Returns:
      (call, arrays): `call(arrays)` is `function(*trees)`.
    """
    leaves, tree = jax.tree.flatten(trees)
    arrays = {n: leaf for n, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def call(arrays: dict[int, Any]) -> Any:
        full = [arrays.get(n, leaf) for n, leaf in enumerate(leaves)]
        return function(*jax.tree.unflatten(tree, full))

    return call, arrays


def trace(
    params: Mapping[str, Any],
    candidates: Sequence[str],
    run: Callable[[Recorder | None, dict[str, Any], Any], Any],
    rest: Any,
) -> dict[str, Traced | None]:
    """Trace a model once, abstractly, and follow its parameters.

    Args:
      params: {path: array or ShapeDtypeStruct} of all that can be told apart.
      candidates: paths of those to be adapted.
      run: (recorder or None, {path: value}, rest) -> outputs of the model.
      rest: tree of all other arrays.

    Returns:
      {candidate: what it does, or None}.

    Raises:
      InputError: a candidate is used in another way than by contractions; or the model
        can be traced, but not with marks in it.
    """
    names = [*candidates, *(path for path in params if path not in candidates)]
    shapes = [tuple(params[path].shape) for path in names]
    values = [
        jax.ShapeDtypeStruct(shape, params[path].dtype)
        for path, shape in zip(names, shapes, strict=True)
    ]

    def program_of(recorder: Recorder | None) -> Any:
        def outputs(values: list, rest: Any) -> list:
            return _outputs(run(recorder, dict(zip(names, values, strict=True)), rest))

        call, arrays = with_arrays_apart(outputs, values, rest)
        return jax.make_jaxpr(call)(arrays).jaxpr

    recorder, program = _recorded(program_of)
    ledger = Ledger(recorder, range(len(candidates)))
    known = [Param(n, identity("k", shape)) for n, shape in enumerate(shapes)]
    others = [None] * (len(program.invars) - len(known))
    for value in follow(program, [*known, *others], ledger):
        ledger.consume(value, "is returned by the model")
    reader = Reader(ledger, names, shapes)
    return {path: reader.read(n) for n, path in enumerate(candidates)}


def _recorded(program_of: Callable[[Recorder | None], Any]) -> tuple[Recorder, Any]:
    """Trace with marks; where that alone fails, say so in one line."""
    try:
        with recording() as recorder:
            return recorder, program_of(recorder)
    except InputError:
        raise
    except Exception as error:
        program_of(None)  # raises, where the model itself is at fault
        kind, first = type(error).__name__, str(error).partition("\n")[0]
        raise InputError(
            "the model can be traced, but not while its methods and handlers are "
            f"watched ({kind}: {first}); contract what is to be adapted by this "
            "library's einsum"
        ) from error


def _outputs(tree: Any) -> list:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
