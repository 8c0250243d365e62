from __future__ import annotations

import errno
import functools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers.trees import filled, small_spec
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.training.checkpoint import Checkpoints
from tsd_jax.training.optimizer import make_optimizer
from tsd_jax.training.sharding import make_mesh, state_shardings
from tsd_jax.training.state import TrainState, create_state

# Reads that Orbax gives up report, from threads of their own, that nobody waits.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

SHAPE = (2, 8, 1024)  # the arrays get files of their own
OPTIMIZER = make_optimizer(optax.linear_schedule(0.1, 0.0, 9), 0.1, clip_norm=1.0)


def abstract(method: str = "tsd", directions: int = 4) -> TrainState:
    layout = Layout((0,), (1,), (2,), lifted=(0,))
    spec = small_spec(method, shape=SHAPE, layout=layout, directions=directions)
    create = functools.partial(create_state, spec=spec, optimizer=OPTIMIZER)
    return jax.eval_shape(create, jax.random.key(0))


def number(seed: int, shapes: Any) -> Any:
    """Fill floats, counters and flags alike with numbers of their own."""
    floats = filled(seed, shapes)
    return jax.tree.map(lambda x: x + (x.dtype != np.float32), floats)


def placed(state: TrainState, mesh_shape: tuple[int, int, int] | None) -> TrainState:
    """Lay a state, abstract or not, out on a mesh of the 8 devices, or on one."""
    if mesh_shape is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda x: one, state)
    else:
        mesh = make_mesh(mesh_shape)
        base = {"k": NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))}
        spec = small_spec(
            "tsd", shape=SHAPE, layout=Layout((0,), (1,), (2,), lifted=(0,))
        )
        places = state_shardings(state, spec, base, mesh)
    if isinstance(state.step, jax.ShapeDtypeStruct):
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            state,
            places,
        )
    return jax.device_put(state, places)


@pytest.fixture(scope="module")
def state() -> TrainState:
    return number(0, abstract())


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory) -> Path:
    """Save step 3, and another state as step 7, from a 1 x 4 x 2 mesh."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, placed(number(1, abstract()), (1, 4, 2)))
        checkpoints.save(7, placed(state, (1, 4, 2)))
    return folder


def restored(folder: Path, template: TrainState) -> TrainState:
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(template)


@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 2, 2), (8, 1, 1), None])
def test_round_trip_into_any_sharding(saved, state, mesh):
    """Every leaf bit for bit, with its type, where the template says."""
    template = placed(abstract(), mesh)
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest == 7
        got = checkpoints.restore(template)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for x, want, at in zip(*map(jax.tree.leaves, (got, state, template)), strict=True):
        assert x.dtype == want.dtype
        assert x.sharding.is_equivalent_to(at.sharding, x.ndim)
        np.testing.assert_array_equal(x, want)


def test_none_there(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(InputError, match=rf"no checkpoint in {tmp_path}"):
            checkpoints.restore(placed(abstract(), None))


@pytest.mark.parametrize(
    ("method", "directions", "reason"),
    [
        ("tsd", 5, r"gain has shape \(.*4\), not \(.*5\)"),
        ("tsd+keep", 4, r"has shape .* not "),
        ("lora", 4, r"left is not wanted"),
    ],
)
@pytest.mark.usefixtures("late_reports")
def test_a_state_of_another_spec_is_refused(saved, method, directions, reason):
    template = placed(abstract(method, directions), None)
    with pytest.raises(InputError, match=rf"checkpoints/7 cannot .*{reason}") as caught:
        restored(saved, template)
    assert "\n" not in str(caught.value)


@pytest.fixture
def late_reports() -> Iterator[None]:
    """Let abandoned reads report before another module's test runs."""
    yield
    time.sleep(0.1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [cut, Path.unlink])
@pytest.mark.parametrize(
    "files",
    ["default/_METADATA", "default/manifest.ocdbt", "default/d/*", "default/*/d/*"],
    ids=["names", "manifest", "index", "arrays"],
)
@pytest.mark.usefixtures("late_reports")
def test_a_damaged_checkpoint_is_refused(saved, state, tmp_path, files, harm):
    """Or restored as it was, where the file is one Orbax can do without."""
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    harmed = list((folder / "7").glob(files))
    assert harmed
    for path in harmed:
        harm(path)
    template = placed(abstract(), None)
    if (files, harm) == ("default/_METADATA", Path.unlink):
        got = restored(folder, template)
        jax.tree.map(np.testing.assert_array_equal, got, state)
        return
    way_out = "remove that folder to go on from the one before"
    with pytest.raises(
        InputError, match=rf"7 cannot be restored .*{way_out}"
    ) as caught:
        restored(folder, template)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder / "7")
    got = restored(folder, template)
    jax.tree.map(np.testing.assert_array_equal, got, number(1, abstract()))


def test_a_step_that_is_there_is_left_alone(saved, state, tmp_path):
    """A run that resumes from it and stops at once saves it again."""
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, number(5, abstract()))
    got = restored(folder, placed(abstract(), None))
    np.testing.assert_array_equal(
        got.trainable.adapters["k"].b, state.trainable.adapters["k"].b
    )


def test_only_the_newest_are_kept(state, tmp_path):
    folder = tmp_path / "new" / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state.replace(step=np.asarray(step, np.int32)))
        checkpoints.wait()
        assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
        assert checkpoints.latest == 3
        assert checkpoints.restore(placed(abstract(), None)).step == 3


@pytest.mark.parametrize("when", ["save", "wait_until_finished"])
def test_a_full_disk_is_one_line(state, saved, tmp_path, monkeypatch, when):
    """Orbax writes in the background: it tells with the next call, or the last one."""
    shutil.copytree(saved, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")

    def full(*_, **__):
        raise ValueError("no write") from OSError(errno.ENOSPC, "No space left")

    told = r"no space left on the disk of .*run: make room, and the same command"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._manager, when, full)
        with pytest.raises(InputError, match=told):
            checkpoints.save(9, state) if when == "save" else checkpoints.wait()
    with checkpoints:
        assert checkpoints.latest == 7, "the older ones are intact"
