from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.extraction import settings
from tsd_jax.extraction.settings import Extraction


def test_errors():
    with pytest.raises(InputError, match=r"'moon'; choose one of auto, devices, hosts"):
        Extraction(where="moon")
    with pytest.raises(InputError, match=r"'qr'; choose one of auto, dense, tridiag"):
        Extraction(solver="qr")


def test_devices_are_chosen_by_name_or_by_their_float64(monkeypatch):
    kernel = jnp.zeros((2, 3))
    assert Extraction(where="hosts").on_hosts(kernel)
    assert not Extraction(where="devices").on_hosts(kernel)
    assert not Extraction().on_hosts(kernel)
    assert not Extraction().on_hosts(None)
    monkeypatch.setattr(settings, "has_float64", lambda platform: False)
    assert Extraction().on_hosts(kernel)
    assert Extraction().on_hosts(None)
    assert not Extraction(where="devices").on_hosts(kernel)
    inside = []
    jax.jit(lambda x: inside.append(Extraction().on_hosts(x)))(kernel)
    assert inside == [False], "a traced kernel stays where the program runs"
