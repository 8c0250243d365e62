"""Layouts of four kernels, alone and stacked along one axis or two."""

from __future__ import annotations

from tsd_jax.core.layout import Layout

# As stored: heads (6, 2, 4), each (2, 4, 5), join (2, 5, 6), mix (6, 6).
PLAIN = {
    "heads": Layout((), (0,), (1, 2)),
    "each": Layout((0,), (1,), (2,)),
    "join": Layout((), (0, 1), (2,)),
    "mix": Layout((), (0,), (1,)),
}
FIRST = {
    "heads": Layout((0,), (1,), (2, 3), (0,)),
    "each": Layout((0, 1), (2,), (3,), (0,)),
    "join": Layout((0,), (1, 2), (3,), (0,)),
    "mix": Layout((0,), (1,), (2,), (0,)),
}
SECOND = {
    "heads": Layout((1,), (0,), (2, 3), (1,)),
    "each": Layout((0, 1), (2,), (3,), (1,)),
    "join": Layout((1,), (0, 2), (3,), (1,)),
    "mix": Layout((1,), (0,), (2,), (1,)),
}
LAST = {
    "heads": Layout((3,), (0,), (1, 2), (3,)),
    "each": Layout((0, 3), (1,), (2,), (3,)),
    "join": Layout((3,), (0, 1), (2,), (3,)),
    "mix": Layout((2,), (0,), (1,), (2,)),
}
# The inner scan's axis 1 comes after the outer one's axis 0: stored axis 2.
NESTED = {
    "heads": Layout((0, 2), (1,), (3, 4), (0, 2)),
    "each": Layout((0, 1, 2), (3,), (4,), (0, 2)),
    "join": Layout((0, 2), (1, 3), (4,), (0, 2)),
    "mix": Layout((0, 2), (1,), (3,), (0, 2)),
}
