"""What an export needs, of a run's own adapter and of one in PEFT's format."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.decoders import PUBLISHED, write_decoder
from tests.helpers.trees import STACKED, random_all
from tsd_jax import huggingface
from tsd_jax.app.adapters import PeftFolder, RunAdapter, read_adapter
from tsd_jax.app.model import facts_of
from tsd_jax.binding.linen import make_spec
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, FullParam
from tsd_jax.core.methods import get_method
from tsd_jax.core.spec import Rule, build_spec
from tsd_jax.huggingface import hub
from tsd_jax.storage.adapter_file import BaseFacts, save_adapter
from tsd_jax.storage.run_files import ADAPTER


@pytest.fixture
def run(tmp_path):
    """A run's folder with nothing but its adapter, of a base that is not here."""
    path = "layers/mlp/up_proj/kernel"
    rules = {path: Rule(pattern=".*", rank=2, directions=4)}
    spec = build_spec({path: (3, 6, 7)}, {path: STACKED}, rules, get_method("tsd"))
    folder = tmp_path / "run"
    folder.mkdir()
    trees = random_all(0, spec, 0.1)
    save_adapter(
        folder / ADAPTER,
        *trees,
        spec,
        launched=True,
        base_model="some/base",
        base=BaseFacts("llama", "CAUSAL_LM", tied=False),
    )
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
    assert foreign.files.config["task_type"] == "CAUSAL_LM"
    (tmp_path / "base").mkdir()
    write_decoder(tmp_path / "base", PUBLISHED["llama"])
    ours, theirs = (each.trained(tmp_path / "base") for each in (own, foreign))
    assert ours.factors.keys() == theirs.factors.keys()
    assert max(pair.rank for pair in theirs.factors.values()) == written.rank
    for name, pair in ours.factors.items():
        other = theirs.factors[name]
        np.testing.assert_allclose(
            pair.down @ pair.up, other.down @ other.up, rtol=1e-5, atol=1e-6
        )


KERNELS = Rule(pattern=r"layers/.*/(q_proj|gate_proj)/kernel", rank=2)
EMBEDDING = Full(pattern="embed_tokens/embedding")


def run_of(folder, published, *rules, recorded: bool = True):
    """Write a base, and a run's adapter that knows it by a hub id; return both."""
    (folder / "base").mkdir()
    write_decoder(folder / "base", published)
    config = huggingface.read_config(folder / "base")
    network = huggingface.family_of(config).kind.network
    params, tokens = huggingface.abstract_params(config), np.ones((1, 3), np.int32)
    apply, variables = network(config).apply, {"params": params}
    spec = make_spec(apply, variables, rules, tokens, method="lora")
    (folder / "run").mkdir()
    trainable, directions = random_all(0, spec, 0.1)
    rng = np.random.default_rng(0)
    full = {
        part.path: FullParam(jnp.asarray(rng.normal(size=part.shape), "float32"), part)
        for part in spec.full
    }
    save_adapter(
        folder / "run" / ADAPTER,
        trainable.replace(full=full),
        directions,
        spec,
        launched=True,
        base_model="some/base",
        base=facts_of(config) if recorded else None,
    )
    return folder / "base", read_adapter(folder / "run")


def written(folder, adapter, base: str):
    """Return the tensors and the config of an export."""
    adapter.write_peft(folder, base, None)
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


@pytest.mark.parametrize(
    ("family", "tied", "rules"),
    [
        ("mixtral", False, [KERNELS]),
        ("qwen3", True, [KERNELS, EMBEDDING]),
        ("llama", False, [KERNELS, EMBEDDING]),
    ],
)
def test_an_export_away_from_the_base_is_the_one_beside_it(
    tmp_path, family, tied, rules
):
    published = {**PUBLISHED[family], "tie_word_embeddings": tied}
    base, adapter = run_of(tmp_path, published, *rules)
    here = written(tmp_path / "here", adapter, str(base))
    away = written(tmp_path / "away", adapter, "some/base")
    assert here[0].keys() == away[0].keys()
    for name, tensor in here[0].items():
        np.testing.assert_array_equal(tensor, away[0][name])
    for key in ("ensure_weight_tying", "task_type", "modules_to_save"):
        assert here[1].get(key) == away[1].get(key)
    full = EMBEDDING in rules
    assert away[1].get("ensure_weight_tying", False) == (tied and full)
    experts = any(".block_sparse_moe.experts.0.w1." in name for name in away[0])
    assert experts == (family == "mixtral")


def test_what_is_not_recorded_is_asked_for(tmp_path, monkeypatch):
    base, adapter = run_of(tmp_path, PUBLISHED["mixtral"], KERNELS, recorded=False)
    cached = {}
    monkeypatch.setattr(hub, "_fetch", lambda name, _: fetch(cached, name))
    with pytest.raises(InputError, match="no some/base; --base names the folder"):
        adapter.write_peft(tmp_path / "peft", "some/base", None)
    assert not (tmp_path / "peft").exists()
    cached["some/base"] = base
    tensors, _ = written(tmp_path / "peft", adapter, "some/base")
    assert any("block_sparse_moe.experts" in name for name in tensors)


def test_another_base_is_not_taken_for_the_recorded_one(tmp_path, monkeypatch):
    _, adapter = run_of(tmp_path, PUBLISHED["mixtral"], KERNELS)
    monkeypatch.setattr(hub, "_fetch", lambda name, _: fetch({}, name))
    with pytest.raises(InputError, match=r"wrong/path/of/it does not exist"):
        adapter.write_peft(tmp_path / "peft", "wrong/path/of/it", None)
    with pytest.raises(InputError, match="no other/base; --base names the folder"):
        adapter.write_peft(tmp_path / "peft", "other/base", None)
    (tmp_path / "llama").mkdir()
    write_decoder(tmp_path / "llama", PUBLISHED["llama"])
    for refused in (
        lambda: adapter.write_peft(tmp_path / "peft", str(tmp_path / "llama"), None),
        lambda: adapter.merge(tmp_path / "out", tmp_path / "llama", None, None),
    ):
        with pytest.raises(InputError, match="is a llama, but the adapter was trained"):
            refused()


def fetch(cached, name):
    """Return a cached model, as the hub does."""
    if name not in cached:
        raise InputError(f"no {name}")
    return cached[name]


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"holds neither adapter\.safetensors of a finished run nor"
    ):
        read_adapter(tmp_path)
    with pytest.raises(InputError, match="none does not exist"):
        read_adapter(tmp_path / "none")
