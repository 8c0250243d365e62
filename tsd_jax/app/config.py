"""From a config, a nested mapping of plain values, to typed `Settings` and back."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from tsd_jax.app.settings import Settings
from tsd_jax.core.errors import InputError

T = TypeVar("T")

RENAMED: Mapping[str, str] = {
    "adapter.train_whole": "adapter.full_params",
    "optimizer.whole_learning_rate": "optimizer.full_learning_rate",
    "settling": "auto_launch",
    "settling.launch_min": "auto_launch.launch_min",
    "settling.launch_max": "auto_launch.launch_max",
    "settling.every": "auto_launch.every",
    "settling.threshold": "auto_launch.threshold",
    "settling.patience": "auto_launch.patience",
    "settling.matrices": "auto_launch.matrices",
}
"""{key of an earlier version: the key it is now}."""

_TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple: "a tuple",
}


def settings_from(config: Mapping[str, Any]) -> Settings:
    """Return the settings of a config.

    Args:
      config: {key: value, section: {key: value}}, as `ConfigDict.to_dict()` gives it.

    Raises:
      InputError: a key is unknown or missing, a value has another type, or values do
        not go together.
    """
    return _build(Settings, config, "")


def flatten(settings: Settings) -> dict[str, Any]:
    """Return {"section.key": value}, as config.json records it."""
    return dict(_flat(dataclasses.asdict(settings)))


def keys() -> list[str]:
    """Return all keys there are, as "section.key"."""
    return list(_keys(Settings, ""))


def unknown_key(key: str, known: list[str]) -> InputError:
    """Return the error for a key that does not exist: what it is now, or what is near.

    Args:
      key: as the user gave it.
      known: the keys there are.
    """
    if key in RENAMED:
        return InputError(f"the config key {key!r} is now {RENAMED[key]!r}")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return InputError(f"the config has no key {key!r}; did you mean {near!r}?")


def _build(kind: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Return a section of the values below it, its own sections included."""
    types = get_type_hints(kind)
    for name in values:
        if name not in types:
            raise unknown_key(f"{prefix}{name}", keys())
    for name in types:
        if name not in values:
            raise InputError(f"the config lacks the key '{prefix}{name}'")
    return kind(
        **{
            name: _convert(values[name], wanted, f"{prefix}{name}")
            for name, wanted in types.items()
        }
    )


def _convert(value: Any, wanted: Any, key: str) -> Any:
    """Return a value in the type its key has; whole numbers may stand for floats."""
    if _is_section(wanted):
        if not isinstance(value, Mapping):
            raise InputError(f"the config key {key!r} is a section, not {value!r}")
        return _build(wanted, value, f"{key}.")
    if get_origin(wanted) is tuple and isinstance(value, list | tuple):
        item = get_args(wanted)[0]
        return tuple(_convert(each, item, key) for each in value)
    number = wanted is not bool and isinstance(value, bool)
    if wanted is float and isinstance(value, int) and not number:
        return float(value)
    if number or not isinstance(value, get_origin(wanted) or wanted):
        raise InputError(
            f"{key} must be {_TYPES[get_origin(wanted) or wanted]}, not {value!r}"
        )
    return value


def _is_section(wanted: Any) -> bool:
    return dataclasses.is_dataclass(wanted)


def _keys(kind: type, prefix: str) -> Iterator[str]:
    for name, wanted in get_type_hints(kind).items():
        if _is_section(wanted):
            yield from _keys(wanted, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
