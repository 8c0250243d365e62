from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest

from tsd_jax.binding.calls import (
    EINSUM,
    Call,
    Site,
    calls_of,
    fits,
    method_name,
    named_arguments,
    replaced,
)
from tsd_jax.core.errors import InputError


class Base:
    def __call__(self, x, y=1):
        return x


class Derived(Base):
    def __call__(self, x, y=1):
        return super().__call__(x)


class Heir(Base):
    pass


def test_a_method_is_told_from_the_one_it_overrides():
    names = [method_name(kind.__call__) for kind in (Base, Derived, Heir)]
    assert names[0] == names[2] != names[1]
    assert method_name(functools.partial(Base.__call__, Base())) == names[0]


def test_a_class_fits_where_it_has_the_method():
    site = Site(method_name(Base.__call__), "['x']", "", "ab,bc->ac")
    assert fits((site,), Derived)
    assert not fits((site._replace(method=method_name(Derived.__call__)),), Base)
    assert fits((), Base)
    assert fits((site._replace(method=EINSUM),), int)


@pytest.mark.parametrize(("args", "kwargs"), [((5,), {}), ((), {"x": 5})])
def test_arguments_have_names_however_they_are_passed(args, kwargs):
    tree, unpack = named_arguments(Base().__call__, args, kwargs)
    assert tree == {"x": 5}
    given, named = unpack({"x": 6})
    assert Base()(*given, **named) == 6


def test_one_output_is_replaced():
    assert replaced((1, {"a": 2}), "[1]['a']", lambda leaf: leaf + 1) == (1, {"a": 3})
    assert replaced(1, "", lambda leaf: leaf + 1) == 2
    with pytest.raises(InputError, match="make the spec from a call like this one"):
        replaced((1, 2), "", lambda leaf: leaf)


SITES = (Site("m", "['x']", "", "ab,bc->ac"), Site("m", "['x']", "", "abc,cd->abd"))


def test_the_subscripts_are_those_of_the_inputs_axes():
    for shape, subscripts in (((2, 3), "ab,bc->ac"), ((2, 3, 4), "abc,cd->abd")):
        ((_, call),) = calls_of("k", SITES, "m", {"x": jnp.ones(shape)}, None)
        assert call.subscripts == subscripts
    assert calls_of("k", SITES, "other", {}, None) == []


def test_a_call_unlike_the_traced_ones_is_refused():
    with pytest.raises(InputError, match="called in another way than where the spec"):
        calls_of("k", SITES, "m", {"x": jnp.ones(3)}, None)


def test_a_handler_describes_calls_with_any_number_of_axes():
    told = Call("k", jnp.ones(3), "...a,ab->...b")
    ((_, call),) = calls_of("k", SITES, "m", {"x": told.x}, lambda: told)
    assert call.subscripts == "...a,ab->...b"
    assert calls_of("other", (), "m", {}, lambda: told) == []
