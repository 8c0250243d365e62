from __future__ import annotations

import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.data.iteration import Batches, RandomWindows, hold_out


def arrays(count: int) -> dict[str, np.ndarray]:
    return {"tokens": np.arange(count), "squares": np.arange(count)[:, None] ** 2}


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 18])
def test_every_epoch_sees_every_row_once(batch_size):
    batches = Batches(arrays(7), batch_size, seed=0)
    steps = -(-4 * 7 // batch_size)
    stream = np.concatenate([batches.batch(n)["tokens"] for n in range(steps)])[:28]
    epochs = stream.reshape(4, 7)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(7)] * 4)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_rows_stay_together():
    batch = Batches(arrays(7), 3, seed=0).batch(1)
    np.testing.assert_array_equal(batch["squares"][:, 0], batch["tokens"] ** 2)


def test_a_batch_is_a_function_of_seed_and_step():
    first, second = Batches(arrays(100), 8, seed=3), Batches(arrays(100), 8, seed=3)
    forward = [first.batch(n)["tokens"] for n in range(40)]
    backward = [second.batch(n)["tokens"] for n in reversed(range(40))]
    np.testing.assert_array_equal(forward, backward[::-1])
    other = Batches(arrays(100), 8, seed=4).batch(0)["tokens"]
    assert not np.array_equal(forward[0], other)


def test_the_order_is_the_same_on_every_machine():
    # Philox(key=[5, epoch]) raw words, sorted: fixed by the algorithm.
    stream = Batches(arrays(6), 6, seed=5)
    assert stream.batch(0)["tokens"].tolist() == [2, 4, 3, 1, 5, 0]
    assert stream.batch(1)["tokens"].tolist() == [4, 5, 1, 0, 2, 3]


def test_steps_of_epochs():
    batches = Batches(arrays(10), 4, seed=0)
    assert [batches.steps(n) for n in (1, 2, 3)] == [3, 5, 8]


def test_random_windows_are_spans_of_the_text():
    ids = np.arange(1000, 1020)
    source = RandomWindows(ids, 4, 64, seed=0)
    batch = source.batch(7)
    starts = batch["tokens"][:, 0]
    np.testing.assert_array_equal(batch["tokens"], starts[:, None] + np.arange(4))
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert batch["weights"].shape == (64, 4)
    assert batch["weights"].all()
    # Every start is possible, the first and the last included.
    assert set(starts.tolist()) == set(range(1000, 1016))
    again = RandomWindows(ids, 4, 64, seed=0).batch(7)
    np.testing.assert_array_equal(batch["tokens"], again["tokens"])
    assert not np.array_equal(batch["tokens"], source.batch(8)["tokens"])


def test_hold_out_splits_at_random_and_in_order():
    rest, held = hold_out(list(range(50)), 10, seed=42)
    assert (len(rest), len(held)) == (40, 10)
    assert sorted(rest + held) == list(range(50))
    assert rest == sorted(rest)
    assert held == sorted(held)
    assert held not in (list(range(10)), list(range(40, 50)))
    assert held != hold_out(list(range(50)), 10, seed=43)[1]


def test_bad_requests():
    with pytest.raises(InputError, match="give at least one"):
        Batches({"tokens": np.zeros((0, 3))}, 2, seed=0)
    with pytest.raises(InputError, match="batch size is 0"):
        Batches(arrays(3), 0, seed=0)
    with pytest.raises(InputError, match="seed is -1"):
        Batches(arrays(3), 2, seed=-1)
    with pytest.raises(InputError, match="too few for one window of 4"):
        RandomWindows(np.arange(4), 4, 2, seed=0)
    with pytest.raises(InputError, match="cannot hold out 3 of 3"):
        hold_out([1, 2, 3], 3, seed=0)
