from __future__ import annotations

import jax
import jax.numpy as jnp

from tsd_jax.binding.marks import Recorder, recorder, recording


def test_a_run_is_marked_and_changes_nothing():
    with recording() as made:
        assert recorder() is made

        def function(x, kernel):
            arguments = {"x": x, "flag": True, "n": jnp.arange(3)}
            return made.run("m", "module", {4: kernel}, arguments, lambda a: a["x"] * 2)

        program = jax.make_jaxpr(function)(jnp.ones(3), jnp.ones((3, 3)))
    assert recorder() is None
    names = [equation.primitive.name for equation in program.jaxpr.eqns]
    assert [name for name in names if name.startswith("tsd")] == [
        "tsd_enter",
        "tsd_leave",
    ]
    assert made.regions[0].arguments == ("['x']",)
    assert made.regions[0].sources == (4,)
    assert made.outputs == {0: ("",)}


def test_vmap_tells_which_axes_are_never_seen():
    made = Recorder()

    def function(x, kernel):
        return made.run("m", "module", {0: kernel}, {"x": x}, lambda a: a["x"])

    twice = jax.vmap(jax.vmap(function, (0, None)), (None, 1))
    program = jax.make_jaxpr(twice)(jnp.ones((3, 2)), jnp.ones((2, 5, 2)))
    enter = program.jaxpr.eqns[0]
    assert enter.params["lifted"] == ((0,), (1,))


def test_recorders_are_told_apart():
    assert Recorder().number != Recorder().number
