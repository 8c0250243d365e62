"""What every test runs under: fake devices, strict ranks, no network."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

flags = ["--xla_force_host_platform_device_count=8"]
# Programs here are small and most run once: compiling is what takes the time.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# One worker compiles what another, or the next run, needs too; a bound on the size
# makes JAX lock the folder.
PROGRAMS = ROOT / ".pytest_cache" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import jax
import pytest

from tests.helpers.compiled import optimized
from tests.helpers.shapes import check_shapes

check_shapes()
jax.config.update("jax_numpy_rank_promotion", "raise")


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
