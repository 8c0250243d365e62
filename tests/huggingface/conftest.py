from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.small_llama import random_params


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Parameters of the small Llama."""
    return random_params()
