"""Checkpoints of the training state, by Orbax; the base model is never in them."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tsd_jax.core.errors import InputError
from tsd_jax.storage.disk import is_full, silence_full_disks
from tsd_jax.training.state import TrainState

_UNREADABLE = (ValueError, KeyError, TypeError, OSError)


def _named(state: Any) -> dict[str, Any]:
    """Return {path in the tree: leaf}, independent of the classes around the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").replace("/", "."): leaf
        for path, leaf in leaves
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence the reads that Orbax abandons, each of which prints many lines."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _refusing_full_disks(folder: Path) -> Iterator[None]:
    """Raise InputError where an error within says that the disk is full."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise InputError(
            f"no space left on the disk of {folder}: make room, and the same command "
            "resumes from the last checkpoint"
        ) from None


class Checkpoints:
    """The saved states of a run, under one folder; a context manager.

    Args:
      folder: folder of the checkpoints, created if it does not exist.
      keep: number of the newest checkpoints to keep.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __enter__(self) -> Checkpoints:
        silence_full_disks()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            with _refusing_full_disks(self._folder):
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest saved step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Save a state in the background, unless its step is saved already.

        Args:
          step: number of steps taken.
          state: the state after them.

        Raises:
          InputError: there is no room for it, or for the one before.
        """
        if step not in self._manager.all_steps():
            with _refusing_full_disks(self._folder):
                self._manager.save(step, args=ocp.args.StandardSave(_named(state)))

    def wait(self) -> None:
        """Wait until all saved states are on disk.

        Raises:
          InputError: there is no room for them.
        """
        with _refusing_full_disks(self._folder):
            self._manager.wait_until_finished()

    def restore(self, template: TrainState) -> TrainState:
        """Return the newest state, with the shapes and shardings of `template`.

        Args:
          template: state of arrays or of ShapeDtypeStructs with shardings.

        Raises:
          InputError: there is no checkpoint, or it is damaged or has other shapes.
        """
        step = self.latest
        if step is None:
            raise InputError(f"no checkpoint in {self._folder}")
        reason = self._mismatch(step, _named(template))
        if reason:
            raise InputError(
                f"checkpoint {self._folder / str(step)} cannot be restored ({reason}): "
                "it is of another model or other settings; use a new workdir"
            )
        with _quietly():
            restored, reason = self._read(step, _named(template))
            if restored is None:
                # Pending reads must end before the objects they report to are freed.
                time.sleep(0.5)
                gc.collect()
        if restored is None:
            raise InputError(
                f"checkpoint {self._folder / str(step)} cannot be restored ({reason}); "
                "remove that folder to go on from the one before, or use a new workdir"
            )
        leaves = [restored[name] for name in _named(template)]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def _mismatch(self, step: int, template: dict[str, Any]) -> str | None:
        """Return how a saved step differs from a template, or None; reads no array."""
        try:
            found = {k: v.shape for k, v in self._manager.item_metadata(step).items()}
        except Exception:  # Unreadable: reading the arrays reports why.
            return None
        if odd := sorted(found.keys() ^ template.keys()):
            return f"{odd[0]} is {'not wanted' if odd[0] in found else 'missing'}"
        for name, leaf in template.items():
            if tuple(found[name]) != tuple(leaf.shape):
                return f"{name} has shape {tuple(found[name])}, not {tuple(leaf.shape)}"
        return None

    def _read(self, step: int, template: dict[str, Any]) -> tuple[Any, str]:
        """Return the arrays of a step, or None and why they cannot be read."""
        try:
            args = ocp.args.StandardRestore(template)
            return self._manager.restore(step, args=args), ""
        except Exception as error:
            # Orbax raises a bare Exception where an array cannot be read.
            if type(error) is not Exception and not isinstance(error, _UNREADABLE):
                raise
            return None, str(error.__cause__ or error).splitlines()[0]
