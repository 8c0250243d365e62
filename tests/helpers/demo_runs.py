"""Settings of short runs of the demo's model, and what such runs leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from configs import demo
from tsd_jax.app.build import prepare
from tsd_jax.app.config import settings_from
from tsd_jax.app.run import execute
from tsd_jax.app.settings import Settings
from tsd_jax.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / demo.ASSETS

SMALL: dict[str, Any] = {
    "mesh": (2, 2, 2),
    "cache_dir": "off",
    "check": False,
    "model__path": str(ASSETS / "model"),
    "data__path": str(ASSETS / "task/train.json"),
    "data__eval_path": str(ASSETS / "task/test.json"),
    "adapter__pattern": r"layers/.*/q_proj/kernel",
    "adapter__rank": 4,
    "adapter__dropout": 0.1,
    "method__launch_step": 2,
    "eval__limit": 8,
    "eval__batch_size": 8,
    "train__batch_size": 8,
    "train__micro_batches": 2,
    "train__steps": 6,
    "train__log_every": 1,
}
"""{section__key: value}: 6 steps on few kernels, on eight devices."""


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested config with values by "section__key"."""
    new = {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (new[section] if section else new)[name] = value
    return new


def small_settings(**changes: Any) -> Settings:
    """Return the demo's settings, cut short by `SMALL`, with changes."""
    return settings_from(changed(demo.get_config().to_dict(), SMALL | changes))


def carry_out(settings: Settings, workdir: Path) -> None:
    """Run to the end."""
    execute(settings, prepare(settings), workdir)


def assert_refused(
    make: Callable[[Settings], Any], changes: Mapping[str, Any], message: str
) -> None:
    """Assert that settings, or what is made of them, are refused in one line."""
    with pytest.raises(InputError, match=message) as caught:
        make(small_settings(**changes))
    assert "\n" not in str(caught.value)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def summary(workdir: Path) -> dict[str, Any]:
    """Read summary.json."""
    return json.loads((workdir / "summary.json").read_text())
