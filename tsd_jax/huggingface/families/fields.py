"""One config.json, read field by field: typed, with defaults, refusing by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError
from tsd_jax.models.rope import ROPE_TYPES, RopeScaling

_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list}
_REQUIRED: Any = object()
# Where null says something else than nothing at all.
_NULLABLE = {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "num_key_value_heads",
    "sliding_window",
}


@dataclasses.dataclass(frozen=True)
class Fields:
    """Hold what a config.json says, over what transformers assumes where it is silent.

    Attributes:
      file: to name in errors. values: of the JSON object. defaults: of the family.
    """

    file: Path
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def get(self, name: str, kind: str, default: Any = _REQUIRED) -> Any:
        """Return a field of type `kind`, or `default` where there is none or null.

        Raises:
          InputError: if it is not there and has no default, or has another type.
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
        """Say that `name` is not what is supported."""
        return InputError(
            f"{self.file}: {name} is {value!r}, and only {only} is supported: choose "
            "another checkpoint"
        )

    def table(self, settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """Return one of several tables of rotary settings, {} where it is null.

        Its type goes by `rope_type`, whichever of its two names it has.

        Raises:
          InputError: if it is no table.
        """
        found = settings.get(name) or {}
        if not isinstance(found, dict):
            raise self.refuse(f"rope type of {name}", found, "a table of settings")
        kind = found.get("rope_type", found.get("type"))
        return found if kind is None else {**found, "rope_type": kind}

    def rope(self, *, aliases: Mapping[str, str] | None = None) -> Mapping[str, Any]:
        """Find the rotary embedding's settings where transformers 5 or 4 has them."""
        found = self.values.get("rope_scaling") or self.values.get("rope_parameters")
        found = {} if found is None else found
        if not isinstance(found, dict):
            raise self.refuse("rope type", found, "a table of settings")
        kind = found.get("rope_type", found.get("type", "default"))
        kind = (aliases or {}).get(kind, kind)
        given = {name: value for name, value in found.items() if value is not None}
        theta = self.get("rope_theta", "float")
        return {"rope_theta": theta, **given, "rope_type": kind}

    def scaling(self, settings: Mapping[str, Any]) -> RopeScaling | None:
        """Read the scaling of the rotary positions from their settings.

        Raises:
          InputError: if its type is not known, or a setting is missing or wrong.
        """
        kind = settings["rope_type"]
        if kind == "default":
            return None
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise self.refuse("rope type", kind, f"default, {', '.join(ROPE_TYPES)}")
        longest = self.get("max_position_embeddings", "int")
        # A field of the config itself goes before one of the settings.
        trained = self.get(
            "original_max_position_embeddings",
            "int",
            settings.get("original_max_position_embeddings", longest),
        )
        known = {name: value for name, value in settings.items() if value is not None}
        known |= {"original_max_position_embeddings": trained}
        known |= {"max_position_embeddings": longest}
        if kind == "longrope" and isinstance(trained, int) and trained > 0:
            known.setdefault("factor", longest / trained)
        values = {}
        for field in dataclasses.fields(ROPE_TYPES[kind]):
            if field.name in known:
                what = f"{self.file}: {field.name!r} of rope type {kind!r}"
                wanted = str(field.type).partition(" |")[0]
                values[field.name] = checked(what, known[field.name], wanted)
            elif field.default is dataclasses.MISSING:
                raise InputError(
                    f"{self.file}: rope type {kind!r} lacks {field.name!r}: fetch the "
                    "model's config"
                )
        return ROPE_TYPES[kind](**values)


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


def checked(what: str, value: Any, kind: str) -> Any:
    """Return `value` if it is of type `kind`, a list of numbers as a tuple.

    Raises:
      InputError: if it is not; the line says `what` it is.
    """
    if kind == "tuple[float, ...]" and isinstance(value, list):
        return tuple(checked(what, each, "float") for each in value)
    wanted = _TYPES.get(kind, ())
    if isinstance(value, bool) != (kind == "bool") or not isinstance(value, wanted):
        raise InputError(
            f"{what} must be of type {kind}, not {value!r}: correct the model's config"
        )
    return value
