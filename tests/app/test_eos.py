from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.helpers.demo_runs import ASSETS, carry_out, small_settings
from tsd_jax import huggingface
from tsd_jax.app.build import prepare
from tsd_jax.app.data import read_files
from tsd_jax.app.eos import untrained_eos
from tsd_jax.core.full_params import FullSpec
from tsd_jax.core.methods import get_method
from tsd_jax.core.spec import Spec
from tsd_jax.huggingface.save import write_checkpoint

NOTHING = Spec((), get_method("lora"))
EOS = 3


class Words:
    def convert_ids_to_tokens(self, number):
        return f"<{number}>"


def table(alike: int) -> np.ndarray:
    """Rows of which some, and that of EOS, are one vector and a little noise."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 16))
    same = [EOS, *range(10, 10 + alike)]
    rows[same] = rows[EOS] + 0.01 * rng.normal(size=(alike + 1, 16))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.sum(unit @ unit[EOS] > 0.99) == alike + 1
    return rows.astype(np.float32)


def told(rows, spec=NOTHING, eos: int | None = EOS, *, in_head: bool = False):
    params = {"embed_tokens": {"embedding": jnp.asarray(rows)}}
    if in_head:
        good = {"embedding": jnp.asarray(table(0))}
        params = {"embed_tokens": good, "lm_head": {"kernel": jnp.asarray(rows.T)}}
    return untrained_eos(params, spec, Words(), eos)


@pytest.mark.parametrize("in_head", [False, True])
def test_a_row_like_hundreds_of_others_is_told(in_head):
    line = told(table(150), in_head=in_head)
    assert line is not None
    assert "'<3>'" in line
    assert ("lm_head/kernel" if in_head else "embed_tokens/embedding") in line
    assert "those of 150 other tokens" in line
    assert "train_tokens=\"('<3>',)\"" in line
    assert "\n" not in line
    assert told(table(99), in_head=in_head) is None


def test_rows_of_zeros_are_alike():
    rows = table(0)
    rows[[EOS, *range(10, 130)]] = 0
    assert "those of 120 other" in (told(rows) or "")
    rows[EOS] = 1
    assert told(rows) is None


def test_nothing_is_told_where_it_trains_or_no_target_is_eos():
    rows, path = table(150), "embed_tokens/embedding"
    assert told(rows, eos=None) is None
    part = FullSpec(path=path, shape=rows.shape, rows=(3, 4))
    assert told(rows, Spec((), NOTHING.method, (part,))) is None
    other = FullSpec(path=path, shape=rows.shape, rows=(4, 5))
    assert told(rows, Spec((), NOTHING.method, (other,))) is not None


def test_a_run_says_so_before_its_first_step(tmp_path, capsys):
    model = ASSETS / "model"
    config = huggingface.read_config(model)
    params = huggingface.load_params(model, config, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    eos = tokenizer.eos_token_id
    rows = np.array(params["embed_tokens"]["embedding"])
    rows[10:140] = rows[eos]
    params["embed_tokens"]["embedding"] = jnp.asarray(rows)
    write_checkpoint(tmp_path / "base", config, params)
    tokenizer.save_pretrained(tmp_path / "base")
    changes = {"model__path": str(tmp_path / "base"), "train__steps": 1}
    changes |= {"method__name": "lora", "eval__limit": 1}
    carry_out(small_settings(**changes), tmp_path / "run")
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("warning: the base's row of the EOS token")
    way_out = {"adapter__train_tokens": (tokenizer.eos_token,)}
    prepared = prepare(small_settings(**changes | way_out))
    assert prepared.eos == eos
    assert untrained_eos(params, prepared.spec, tokenizer, prepared.eos) is None
    text = small_settings(**changes, data__kind="text", data__path=__file__)
    assert read_files(text.data, 0).encode(tokenizer, None).eos is None
