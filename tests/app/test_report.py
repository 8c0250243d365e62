from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.trees import random_all, small_spec
from tsd_jax.app import report
from tsd_jax.huggingface.peft.write import PeftExport
from tsd_jax.training.loop import LoopConfig, Stopwatch
from tsd_jax.training.recorder import Recorder
from tsd_jax.training.state import TrainState


def state_of(spec, launched=True):
    trainable, directions = random_all(0, spec)
    return TrainState(
        step=np.int32(3),
        launched=np.asarray(launched),
        trainable=trainable,
        directions=directions,
        opt_state=None,
    )


@pytest.mark.parametrize(
    ("export", "told"),
    [
        (PeftExport(16, {}, 0.0), "adapter of rank 16"),
        (
            PeftExport(24, {}, 0.0),
            "adapter of rank 24 (vLLM serves it with --max-lora-rank)",
        ),
        (PeftExport(24, {}, 0.0, dora=True), "DoRA adapter of rank 24"),
    ],
)
def test_what_serving_takes_is_told(export, told):
    assert report._told(export) == told


def test_directions_that_train_are_counted_by_matrix():
    every = state_of(small_spec("dash", directions=4))
    assert report.gains_used(every) == {"k": [4], "stack": [4, 4, 4]}
    gated = state_of(small_spec("dash", directions=4, auto=True))
    gate = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    directions = gated.directions | {"k": gated.directions["k"].replace(gate=gate)}
    counts = report.gains_used(gated.replace(directions=directions))
    assert counts["k"] == [2]
    assert report.gains_used(state_of(small_spec("lora"))) == {}


def test_the_summary_takes_the_launch_from_the_record():
    spec = small_spec("tsd")
    watch = Stopwatch()
    watch.tokens, watch.seconds = 300, 2.0
    outcome = report.Outcome(state_of(spec), {"nll": 2.0}, {"nll": 1.0}, watch)
    plan = LoopConfig(steps=9, launch_step=3)
    told = report.summary(spec, plan, outcome, {"step": 4, "extract_seconds": 0.5})
    assert (told["launch_step"], told["extract_seconds"], told["steps"]) == (4, 0.5, 9)
    assert (told["before"], told["after"]) == ({"nll": 2.0}, {"nll": 1.0})
    assert told["train_tokens_per_second"] == 150
    assert told["trainable_params"] == spec.trainable
    planned = report.summary(spec, plan, outcome, {"step": plan.launch_step})
    assert (planned["launch_step"], planned["extract_seconds"]) == (3, None)


def test_before_launch_there_are_no_indices(tmp_path):
    spec = small_spec("tsd")
    before = state_of(spec, launched=False)
    with Recorder(tmp_path, steps=1, start=0, launched=False, active=False) as recorder:
        assert report.launched_directions(tmp_path, before, recorder) is None


def test_the_environment_names_versions_and_devices():
    found = report.environment()
    assert found["packages"]["jax"] == jax.__version__
    assert found["devices"].startswith("8 x ")
    assert found["processes"] == 1


def test_a_tree_comes_to_the_host_as_it_is():
    tree = {"a": jnp.arange(3), "b": (jnp.ones((2, 2)), None)}
    here = report.on_host(tree)
    assert jax.tree.structure(here) == jax.tree.structure(tree)
    np.testing.assert_array_equal(here["a"], [0, 1, 2])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(here))
