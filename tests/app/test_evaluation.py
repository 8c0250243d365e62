from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.demo_runs import ASSETS, small_settings
from tsd_jax import huggingface
from tsd_jax.app.build import prepare
from tsd_jax.core.errors import InputError

FIGURES = {
    "nll": {"nll", "perplexity", "tokens"},
    "choices": {"accuracy", "count"},
    "generate": {"exact_match", "count", "unanswered"},
}


@pytest.fixture(scope="module")
def variables():
    config = huggingface.read_config(ASSETS / "model")
    return {"params": huggingface.load_params(ASSETS / "model", config)}


def evaluated(variables, **changes):
    settings = small_settings(
        mesh=(8, 1, 1), train__micro_batches=1, eval__max_new_tokens=2, **changes
    )
    evaluate = prepare(settings).evaluate
    assert evaluate is not None
    return evaluate(variables)


@pytest.mark.parametrize("metric", FIGURES)
def test_every_metric_scores_the_untouched_model(metric, variables):
    figures = evaluated(variables, eval__metric=metric)
    assert figures.keys() == FIGURES[metric]
    assert all(np.isfinite(value) for value in figures.values())
    assert figures.get("count", 8) == 8  # the limit


def test_batches_do_not_change_the_figures(variables):
    """A last batch of 4 of 8 rows is filled up; what fills it counts nowhere."""
    for metric in ("choices", "generate"):
        one, other = (
            evaluated(variables, eval__metric=metric, eval__limit=12, **size)
            for size in ({"eval__batch_size": 8}, {"eval__batch_size": 16})
        )
        assert one == other
        assert one["count"] == 12


@pytest.mark.parametrize(
    "change",
    [
        {"num_beams": 2},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
        {"stop": ("a",)},
    ],
)
def test_answers_are_generated_by_any_strategy(variables, change):
    changes = {f"eval__{name}": value for name, value in change.items()}
    one, other = (
        evaluated(variables, eval__metric="generate", eval__batch_size=size, **changes)
        for size in (8, 16)
    )
    assert one == other
    assert one["count"] == 8


def test_text_is_scored_by_its_windows(variables, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one two three four five " * 60)
    text = {"data__kind": "text", "data__path": str(file), "data__eval_path": ""}
    split = {"data__held_out": 0.5, "data__length": 8, "eval__limit": 2}
    figures = evaluated(variables, eval__metric="nll", **text, **split)
    assert figures["tokens"] == 2 * 8
    with pytest.raises(
        InputError, match=r"'choices' cannot be computed of data.kind 'text', .* nll"
    ):
        evaluated(variables, eval__metric="choices", **text, **split)
