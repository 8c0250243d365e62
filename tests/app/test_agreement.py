from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

import tsd_jax as tsd
from tests.helpers.demo_runs import small_settings
from tsd_jax.app.build import Prepared, prepare
from tsd_jax.core.errors import InputError
from tsd_jax.storage.adapter_file import save_adapter


def prepared(**changes) -> Prepared:
    return prepare(small_settings(method__name="lora", **changes))


def saved(file, **changes) -> str:
    """Write an adapter of these settings, and return its file."""
    made = prepared(**changes)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made.base.params)
    trees = tsd.init(jax.random.key(0), made.spec, params=zeros)
    save_adapter(file, *trees, made.spec, launched=False)
    return str(file)


def told_flags(path, **changes) -> dict[str, str]:
    """Return the flags of the line that refuses an adapter."""
    with pytest.raises(InputError, match="adapts other things than") as caught:
        prepared(adapter__start=path, **changes)
    line = str(caught.value)
    assert "\n" not in line
    return dict(re.findall(r'--config\.adapter\.(\w+)="([^"]*)"', line))


def test_the_flags_that_make_the_config_agree_are_told(tmp_path):
    own = {
        "adapter__rank": 2,
        "adapter__alpha": 6.0,
        "adapter__scaling": "rslora",
        "adapter__dora": True,
        "adapter__pattern": "layers/(mlp/up|self_attn/[qv])_proj/kernel",
    }
    path = saved(tmp_path / "a.safetensors", **own)
    flags = told_flags(path)
    pattern = flags.pop("pattern")
    assert flags == {"rank": "2", "alpha": "6.0", "scaling": "rslora", "dora": "True"}
    spec = prepared(**own | {"adapter__pattern": pattern, "adapter__start": path}).spec
    modules = ("mlp/up_proj", "self_attn/q_proj", "self_attn/v_proj")
    assert spec.paths == tuple(f"layers/{each}/kernel" for each in modules)
    own |= {"adapter__alpha": 3.0 * 2**0.5, "adapter__dora": False}
    own |= {"adapter__start": path, "adapter__pattern": pattern}
    path = str(own.pop("adapter__start"))
    assert told_flags(path, **own).keys() == {"alpha", "dora"}


def test_what_trains_in_full_must_train_here_too(tmp_path):
    token = prepared().base.tokenizer.eos_token
    full = {"adapter__full_params": "norm/scale", "adapter__train_tokens": (token,)}
    path = saved(tmp_path / "a.safetensors", **full)
    flags = {"full_params": "norm/scale", "train_tokens": f"('{token}',)"}
    assert told_flags(path) == flags
    assert told_flags(path, adapter__full_params="norm/scale") == {
        "train_tokens": flags["train_tokens"]
    }
    agreed = prepared(adapter__start=path, **full)
    part = {each.path: each for each in agreed.spec.full}["embed_tokens/embedding"]
    eos = agreed.base.tokenizer.eos_token_id
    assert part.rows == (eos, eos + 1)


def test_rows_of_tokens_that_the_model_does_not_know_are_told(tmp_path):
    path = saved(tmp_path / "a.safetensors", model__added_tokens=("<a>", "<b>"))
    with pytest.raises(InputError, match=r"name them in model\.added_tokens"):
        prepared(adapter__start=path)
    again = prepared(adapter__start=path, model__added_tokens=("<a>", "<b>"))
    assert again.base.added is not None
