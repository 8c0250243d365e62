from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.encoders import PUBLISHED, write_encoder
from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import Labels
from tsd_jax.huggingface import read_config
from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.merge_encoder import Trained, write_merged

QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    write_encoder(folder, PUBLISHED["bert"])
    (folder / "tokenizer.json").write_text("{}")
    return folder


def factors(rows: int = 32, columns: int = 32) -> Factors:
    rng = np.random.default_rng(0)
    down, up = rng.normal(size=(rows, 2)), rng.normal(size=(2, columns))
    return Factors(down.astype(np.float32), up.astype(np.float32))


def head(labels: int) -> dict[str, FullTensor]:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(labels, 32)).astype(np.float32)
    bias = rng.normal(size=labels).astype(np.float32)
    return {
        "classifier.weight": FullTensor("classifier", "weight", weight),
        "classifier.bias": FullTensor("classifier", "bias", bias),
    }


def test_changes_and_a_new_head_go_into_the_checkpoint(tmp_path, base):
    out, pair, full = tmp_path / "out", factors(), head(2)
    labels = Labels("classification", 2, ("no", "yes"))
    dtype = write_merged(
        out, base, read_config(base), Trained({QUERY: pair}, full), labels=labels
    )
    assert dtype == "float32"
    old, new = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert new.keys() == old.keys()
    expected = old | {name: each.value for name, each in full.items()}
    expected[f"{QUERY}.weight"] = old[f"{QUERY}.weight"] + (pair.down @ pair.up).T
    for name, value in expected.items():
        np.testing.assert_allclose(new[name], value, rtol=1e-6, atol=1e-6)
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["hidden_dropout_prob"] == 0.1  # an entry not known here is kept
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("trained", "told"),
    [
        (Trained({"bert.x": factors()}, {}), r"no tensor 'bert.x.weight'"),
        (Trained({QUERY: factors(31)}, {}), r"but the adapter needs \(31, 32\)"),
        (
            Trained({}, {"x.weight": FullTensor("x", "weight", np.zeros(2), (0, 1))}),
            "rows of an encoder's tensor",
        ),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path, base, trained, told):
    with pytest.raises(InputError, match=told):
        write_merged(tmp_path / "out", base, read_config(base), trained)
    assert not (tmp_path / "out").exists()
