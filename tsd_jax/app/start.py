"""Where a run starts from: an adapter that exists, instead of one without effect.

What trains is what the config says, as in any run; the adapter must be one of just
these kernels, ranks and scales, or is refused with the flags that make it so. The first
evaluation is then that of the adapter itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from tsd_jax import huggingface
from tsd_jax.app.adapters import ADAPTER, PeftFolder, RunAdapter, read_adapter
from tsd_jax.app.agreement import check_agreement, rules_of
from tsd_jax.app.model import Base
from tsd_jax.app.settings import AdapterSettings, Settings
from tsd_jax.core.adapter import AllDirections, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.spec import Rule, Spec
from tsd_jax.huggingface.full_tensors import full_rule
from tsd_jax.huggingface.model_folder import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from tsd_jax.huggingface.peft.base_copies import base_copies
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.read import PeftAdapter, from_peft
from tsd_jax.storage.adapter_file import SavedAdapter, load_adapter
from tsd_jax.storage.atomic import read_json_or_empty
from tsd_jax.training.state import TrainState

RECORD = "start"
"""What config.json has of the start, where there is one."""


@dataclass(frozen=True)
class Start:
    """The adapter that a run starts from.

    Attributes:
      name: its folder or file, in full.
      sha256: of its files.
      launched: whether it has directions, which go on as they are.
      adapter: as it was read; None where a checkpoint goes on from it.
    """

    name: str
    sha256: str
    launched: bool
    adapter: RunAdapter | PeftFolder | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What config.json has of it."""
        facts = dataclasses.asdict(dataclasses.replace(self, adapter=None))
        del facts["adapter"]
        return facts


def open_start(settings: Settings, workdir: Path | None) -> Start | None:
    """Read the adapter that a run starts from; None for one without effect.

    A run with a checkpoint needs it no more: what is recorded of it is returned.

    Args:
      settings: of the run.
      workdir: of the run, or None.

    Raises:
      InputError: there is no such adapter, it is not the one that the run began with,
        or it has no meaning for the method.
    """
    path = settings.adapter.start
    if not path:
        return None
    old = read_json_or_empty(workdir / "config.json").get(RECORD) if workdir else None
    if workdir and old and any((workdir / "checkpoints").glob("[0-9]*")):
        return Start(**old)
    found = huggingface.resolve_adapter(path)
    adapter = read_adapter(found)
    assert isinstance(adapter, RunAdapter | PeftFolder)
    launched = isinstance(adapter, RunAdapter) and adapter.saved.launched
    start = Start(str(found.resolve()), _sha256(found), launched, adapter)
    if old and old["sha256"] != start.sha256:
        raise InputError(
            f"adapter.start: {path} has changed since the run in {workdir} began with "
            "it: use a new --workdir, or the old files"
        )
    _check_method(settings, start)
    return start


def check_start(
    start: Start | None, settings: AdapterSettings, spec: Spec, base: Base
) -> list[str]:
    """Return what a user should know of the start, a line each.

    Args:
      start: of the run, or None.
      settings: of the config.
      spec: made of them.
      base: the model.

    Raises:
      InputError: the adapter is of other kernels, ranks or scales than the spec.
    """
    if start is None or start.adapter is None:
        return []
    notes = [f"starts from {start.name}"]
    if isinstance(start.adapter, PeftFolder):
        found = _peft(start.adapter.files, base.params, base.config.model_type)
        notes += found.notes
        rules = [rule for rule in found.rules() if isinstance(rule, Rule)]
        kernels = dict(zip(found.kernels, rules, strict=True))
        full = [full_rule(path, layers) for path, layers in found.full.items()]
        parts = dict(zip(found.full, full, strict=True))
    else:
        kernels, parts = rules_of(start.adapter.saved)
    check_agreement(start.name, kernels, parts, settings, spec, base)
    if start.launched:
        assert isinstance(start.adapter, RunAdapter)
        load_adapter(_file(start), spec)
        notes.append("it has launched: its directions go on, and no launch follows")
    elif spec.method.begins_again:
        notes.append(
            f"launch drops what A and B have learned, the start's included, with "
            f"method {spec.method.name!r}; method.keep=True keeps it"
        )
    trained_on = start.adapter.base_model
    if trained_on and trained_on != base.name:
        notes.append(f"it was trained on {trained_on}, and the base is {base.name}")
    return notes


def started(
    start: Start | None, state: TrainState, spec: Spec, base: Base, params: Any
) -> TrainState:
    """Return a new run's state with the adapter it starts from, on the host.

    Args:
      start: of the run, or None.
      state: with adapters without effect.
      spec: of the run.
      base: the model.
      params: its tree.

    Raises:
      InputError: the adapter does not fit the base.
    """
    if start is None or start.adapter is None:
        return state
    if isinstance(start.adapter, PeftFolder):
        found = _peft(start.adapter.files, base.params, base.config.model_type)
        trainable = found.put_into(state.trainable, spec, params=params)
        return state.replace(trainable=trainable)
    if start.launched:
        saved = load_adapter(_file(start), spec)
        return _with(state, saved.trainable, saved.directions)
    trainable = _continued(state.trainable, start.adapter.saved)
    return state.replace(trainable=trainable)


def _with(
    state: TrainState, trainable: Trainable, directions: AllDirections
) -> TrainState:
    return state.replace(
        trainable=trainable,
        directions=directions,
        launched=jnp.ones_like(state.launched),
    )


def _continued(trainable: Trainable, saved: SavedAdapter) -> Trainable:
    """Return what trains with the values of a saved adapter without directions."""
    adapters, full = dict(trainable.adapters), dict(trainable.full)
    for path, old in saved.trainable.adapters.items():
        new = adapters[path]
        if new.kernel.shape != old.kernel.shape:
            raise InputError(
                f"{path} has shape {new.kernel.shape}, but the adapter's kernel has "
                f"{old.kernel.shape}: it belongs to another base"
            )
        adapters[path] = new.replace(a=old.a, b=old.b, magnitude=old.magnitude)
    return Trainable(adapters=adapters, full=full | saved.trainable.full)


def _check_method(settings: Settings, start: Start) -> None:
    """Raise InputError where the method cannot go on from an adapter."""
    method, name = settings.method.method(), settings.adapter.start
    if not start.launched:
        if method.begins_again and settings.method.fixed_launch_step == 0:
            raise InputError(
                f"adapter.start has no effect with method {method.name!r} and "
                "method.launch_step 0, for launch drops it before the first step: "
                "launch later, or set method.keep=True"
            )
        return
    assert isinstance(start.adapter, RunAdapter)
    own = start.adapter.saved.spec.method
    if own != method:
        raise InputError(
            f"adapter.start: {name} was launched by {own}, and the config has "
            f"{method}: set method.* to that, or export it --to peft and start from "
            "the folder that gives"
        )
    if settings.optimizer.restart:
        raise InputError(
            f"optimizer.restart=True needs a launch, but adapter.start {name} has "
            "launched already: leave it False"
        )


def _peft(files: AdapterFiles, params: Any, model_type: str) -> PeftAdapter:
    """Return a PEFT adapter by the parameters of the base."""
    if base_copies(files):
        raise InputError(
            f"adapter.start: {files.folder} holds copies of its base's weights: "
            "export it --to peft, and start from the folder that gives"
        )
    return from_peft(
        files.folder,
        huggingface.module_paths(params, model_type),
        huggingface.tensor_paths(params, model_type),
    )


def _file(start: Start) -> Path:
    """Return the library's own adapter file."""
    path = Path(start.name)
    return path / ADAPTER if path.is_dir() else path


def _sha256(found: Path) -> str:
    """Return the digest of an adapter's files."""
    files = [found]
    if (found / ADAPTER).is_file():
        files = [found / ADAPTER]
    elif found.is_dir():
        files = [found / ADAPTER_CONFIG_FILE, found / ADAPTER_WEIGHTS_FILE]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
