"""What an export needs, of a run's own adapter and of one in PEFT's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.trees import STACKED, random_all
from tsd_jax.app.adapters import ADAPTER, PeftFolder, RunAdapter, read_adapter
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import get_method
from tsd_jax.core.spec import Rule, build_spec
from tsd_jax.storage.adapter_file import save_adapter


@pytest.fixture
def run(tmp_path):
    """A run's folder with nothing but its adapter, of a base that is not here."""
    path = "layers/mlp/up_proj/kernel"
    rules = {path: Rule(pattern=".*", rank=2, directions=4)}
    spec = build_spec({path: (3, 6, 7)}, {path: STACKED}, rules, get_method("tsd"))
    folder = tmp_path / "run"
    folder.mkdir()
    trees = random_all(0, spec, 0.1)
    save_adapter(folder / ADAPTER, *trees, spec, launched=True, base_model="some/base")
    return folder


def test_a_workdir_and_its_file_are_the_same_adapter(run):
    for source in (run, run / ADAPTER):
        found = read_adapter(source)
        assert isinstance(found, RunAdapter)
        assert found.base_model == "some/base"


def test_what_is_written_for_peft_is_read_with_the_same_factors(run, tmp_path):
    own = read_adapter(run)
    written = own.write_peft(tmp_path / "peft", "some/base", None)
    foreign = read_adapter(tmp_path / "peft")
    assert isinstance(foreign, PeftFolder)
    assert foreign.base_model == "some/base"
    assert (foreign.task_type, foreign.tied, foreign.full) == ("CAUSAL_LM", False, {})
    ours, theirs = own.trained(Path("nowhere")), foreign.trained(Path("nowhere"))
    assert ours.factors.keys() == theirs.factors.keys()
    assert max(pair.rank for pair in theirs.factors.values()) == written.rank
    for name, pair in ours.factors.items():
        other = theirs.factors[name]
        np.testing.assert_allclose(
            pair.down @ pair.up, other.down @ other.up, rtol=1e-5, atol=1e-6
        )


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"holds neither adapter\.safetensors of a finished run nor"
    ):
        read_adapter(tmp_path)
    with pytest.raises(InputError, match="none does not exist"):
        read_adapter(tmp_path / "none")
