"""One config.json, read field by field: typed, with defaults, refusing by name."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError
from tsd_jax.models.rope import ROPE_TYPES, RopeScaling

_REQUIRED: Any = object()
# Fields in which null means something of its own, and not "the default".
_NULLABLE = {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "num_key_value_heads",
    "sliding_window",
}


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a config.json, over the defaults transformers has for the rest.

    Attributes:
      file: to name in errors.
      values: of the JSON object.
      defaults: of the family.
    """

    file: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def get(self, name: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """Return a field, or `default` where it is absent or null.

        Args:
          name: of the field.
          kind: its type, as of `checked`.
          default: without one the field is required.

        Raises:
          InputError: if it is absent and has no default, or has another type.
        """
        value = self.values.get(name)
        silent = value is None and not (name in self.values and name in _NULLABLE)
        value = self.defaults.get(name) if silent else value
        if value is None:
            if default is _REQUIRED:
                raise InputError(
                    f"{self.file} lacks {name!r}: fetch the model's config"
                )
            return default
        return checked(f"{self.file}: {name!r}", value, kind)

    def refuse(self, name: str, value: Any, only: Any) -> InputError:
        """Return the error for an unsupported value of `name`."""
        return InputError(
            f"{self.file}: {name} is {value!r}, and only {only} is supported: choose "
            "another checkpoint"
        )

    def table(self, settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """Return one of several tables of rotary settings; {} where it is null.

        The type is under `rope_type`, whichever of its two names it has in the file.

        Args:
          settings: the tables by name.
          name: of the table.

        Raises:
          InputError: if it is not a table.
        """
        found = settings.get(name) or {}
        if not isinstance(found, dict):
            raise self.refuse(f"rope type of {name}", found, "a table of settings")
        kind = found.get("rope_type", found.get("type"))
        return found if kind is None else {**found, "rope_type": kind}

    def rope(self, *, aliases: Mapping[str, str] | None = None) -> Mapping[str, Any]:
        """Return the rotary embedding's settings, as transformers 5 or 4 writes them.

        Args:
          aliases: {a type in the file: the type it means}.

        Raises:
          InputError: if they are not a table.
        """
        found = self.values.get("rope_scaling") or self.values.get("rope_parameters")
        found = {} if found is None else found
        if not isinstance(found, dict):
            raise self.refuse("rope type", found, "a table of settings")
        kind = found.get("rope_type", found.get("type", "default"))
        kind = (aliases or {}).get(kind, kind)
        given = {name: value for name, value in found.items() if value is not None}
        theta = self.get("rope_theta", float)
        return {"rope_theta": theta, **given, "rope_type": kind}

    def scaling(self, settings: Mapping[str, Any]) -> RopeScaling | None:
        """Return the scaling of the rotary positions; None for the default type.

        Args:
          settings: of `rope`.

        Raises:
          InputError: if its type is unknown, or a setting is missing or wrong.
        """
        kind = settings["rope_type"]
        if kind == "default":
            return None
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise self.refuse("rope type", kind, f"default, {', '.join(ROPE_TYPES)}")
        known = self._scaling_values(kind, settings)
        kinds = typing.get_type_hints(ROPE_TYPES[kind])
        values = {}
        for field in dataclasses.fields(ROPE_TYPES[kind]):
            if field.name in known:
                what = f"{self.file}: {field.name!r} of rope type {kind!r}"
                wanted = _without_none(kinds[field.name])
                values[field.name] = checked(what, known[field.name], wanted)
            elif field.default is dataclasses.MISSING:
                raise InputError(
                    f"{self.file}: rope type {kind!r} lacks {field.name!r}: fetch the "
                    "model's config"
                )
        return ROPE_TYPES[kind](**values)

    def _scaling_values(self, kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a scaling, with the lengths that the config has."""
        longest = self.get("max_position_embeddings", int)
        # A field of the config itself takes precedence over one of the settings.
        trained = self.get(
            "original_max_position_embeddings",
            int,
            settings.get("original_max_position_embeddings", longest),
        )
        known = {name: value for name, value in settings.items() if value is not None}
        known |= {"original_max_position_embeddings": trained}
        known |= {"max_position_embeddings": longest}
        if kind == "longrope" and isinstance(trained, int) and trained > 0:
            known.setdefault("factor", longest / trained)
        return known


def rope_settings(scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the entries of a config.json from which `scaling` is read."""
    if scaling is None:
        return {}
    values = {
        field.name: getattr(scaling, field.name)
        for field in dataclasses.fields(scaling)
        if field.name != "max_position_embeddings"
    }
    settings = {name: value for name, value in values.items() if value is not None}
    kind = next(name for name, each in ROPE_TYPES.items() if each is type(scaling))
    return {"rope_scaling": {"rope_type": kind, **settings}}


def checked(what: str, value: Any, kind: Any) -> Any:
    """Return a JSON value if it is of a type, a list of numbers as a tuple.

    Args:
      what: the value is, for the message.
      value: as the file has it.
      kind: int, float (an integer will do), bool, str, list or tuple[float, ...].

    Raises:
      InputError: if the value has another type.
    """
    if kind == tuple[float, ...]:
        if isinstance(value, list):
            return tuple(checked(what, each, float) for each in value)
        raise _wrong_type(what, value, "tuple[float, ...]")
    accepted = (int, float) if kind is float else kind
    unexpected_bool = isinstance(value, bool) and kind is not bool
    if unexpected_bool or not isinstance(value, accepted):
        raise _wrong_type(what, value, kind.__name__)
    return value


def _wrong_type(what: str, value: Any, kind: str) -> InputError:
    return InputError(
        f"{what} must be of type {kind}, not {value!r}: correct the model's config"
    )


def _without_none(hint: Any) -> Any:
    """Return the type itself of an annotation such as `float | None`."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    return next(each for each in typing.get_args(hint) if each is not types.NoneType)
