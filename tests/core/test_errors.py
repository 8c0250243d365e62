from __future__ import annotations

import pytest

from tsd_jax.core.errors import InputError, check_choice


def test_input_errors_are_value_errors_of_their_own():
    assert issubclass(InputError, ValueError)
    assert InputError is not ValueError


def test_a_name_is_checked_against_its_choices():
    check_choice("color", "red", {"red": 1, "blue": 2})
    with pytest.raises(InputError) as caught:
        check_choice("color", "rot", {"red": 1, "blue": 2})
    assert str(caught.value) == "unknown color 'rot'; choose one of red, blue"
    with pytest.raises(InputError, match=r"^rule 'x': unknown color 'rot'; choose one"):
        check_choice("color", "rot", ("red",), where="rule 'x'")
