"""Check the shapes and types that the annotations of core and extraction state.

Import this before `tsd_jax`. TSD_JAX_SKIP_SHAPE_CHECKS=1 switches the checks off.
"""

from __future__ import annotations

import os

import jaxtyping
from beartype import BeartypeConf, beartype

# An int is accepted where a float is annotated, as type checkers do.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_shapes() -> None:
    """Check every call in core and extraction, from their import on."""
    if os.environ.get("TSD_JAX_SKIP_SHAPE_CHECKS") != "1":
        rooms = ["tsd_jax.core", "tsd_jax.extraction"]
        jaxtyping.install_import_hook(rooms, "tests.helpers.shapes.checked")
