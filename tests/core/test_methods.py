from __future__ import annotations

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import METHODS, get_method


@pytest.mark.parametrize(
    ("name", "keep", "launches", "ranked", "columns"),
    [
        ("lora", False, False, 0, 0),
        ("dash", False, True, 3, 3),
        ("init", False, True, 5, 5),
        ("tsd", False, True, 5, 5),
        ("init", True, True, 5, 10),
        ("tsd", True, True, 5, 10),
    ],
)
def test_what_each_method_takes_at_rank_5_with_3_directions(
    name, keep, launches, ranked, columns
):
    method = get_method(name, keep=keep)
    assert (method.name, method.keep) == (name, keep)
    assert method.launches is launches
    assert method.ranked(5, 3) == ranked
    assert method.columns(5, 3) == columns


def test_tsd_ranks_once_for_both():
    assert get_method("tsd").ranked(rank=2, directions=7) == 7
    assert get_method("init").ranked(rank=2, directions=7) == 2
    assert get_method("tsd", keep=True).columns(rank=2, directions=7) == 9


def test_unknown_methods_name_the_known_ones():
    with pytest.raises(InputError, match=r"'olora'.*lora, dash, init, tsd, pissa"):
        get_method("olora")
    assert list(METHODS)[:4] == ["lora", "dash", "init", "tsd"]


@pytest.mark.parametrize(
    ("name", "ranking"),
    [("pissa", "largest"), ("milora", "smallest"), ("random", "random")],
)
def test_rivals_are_init_by_another_ranking(name, ranking):
    method = get_method(name)
    assert (method.ranking, method.restart, method.gains) == (ranking, True, False)
    assert not method.needs_delta
    assert get_method(name, start="sigma+p").needs_delta
    assert get_method("init", ranking=ranking, start="zero").ranking == ranking


def test_readings_are_refused_by_name():
    with pytest.raises(InputError, match="unknown ranking 'best'; choose one of rates"):
        get_method("tsd", ranking="best")
    with pytest.raises(InputError, match="unknown start 'p'; choose one of sigma,"):
        get_method("tsd", start="p")
    with pytest.raises(InputError, match=r"start='zero' has no meaning for.*'dash'"):
        get_method("dash", start="zero")
    with pytest.raises(InputError, match=r"ranking='random' has no meaning.*'lora'"):
        get_method("lora", ranking="random")


@pytest.mark.parametrize("name", ["lora", "dash"])
def test_keep_is_refused_where_nothing_is_dropped(name):
    with pytest.raises(InputError, match=f"keep=True has no meaning for.*{name}"):
        get_method(name, keep=True)
