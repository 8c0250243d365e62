from __future__ import annotations

from tsd_jax.core.errors import InputError


def test_input_errors_are_value_errors_of_their_own():
    assert issubclass(InputError, ValueError)
    assert InputError is not ValueError
