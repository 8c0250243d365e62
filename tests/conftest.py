"""What every test runs under: fake devices, strict ranks, no network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs here are small and most run once: compiling is what takes the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import jax
import pytest

from tests.helpers.compiled import optimized
from tests.helpers.shapes import check_shapes

check_shapes()
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(name="optimized")
def _optimized() -> Iterator[None]:
    """Compile as users do."""
    with optimized():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real models and data beside the project, or skip."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        if os.environ.get("REQUIRE_SHARED") == "1":
            pytest.fail(f"REQUIRE_SHARED=1, but {folder} does not exist")
        pytest.skip("the folder ../shared with real models is not here")
    return folder
