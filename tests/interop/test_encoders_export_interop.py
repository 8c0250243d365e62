"""Encoders with a head: stock PEFT and transformers give our logits, and we theirs."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from tests.helpers.compiled import QUICK
from tests.helpers.encoders import PUBLISHED, inputs, write_encoder
from tests.helpers.trees import filled
from tsd_jax import huggingface
from tsd_jax.app.export import main
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.full_params import Full
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Rule
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.huggingface.peft.write import to_peft
from tsd_jax.storage.adapter_file import save_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

RULE = Rule(
    pattern=r"layers/(attention/self/\w+|(attention/)?output/dense|intermediate/dense)"
    "/kernel",
    rank=3,
    directions=2,
)
TOLERANCE = 3e-4
families = pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v3"])


def without_head(folder, name):
    """Write a base as it is pretrained: no classifier, and a BERT without prefix."""
    write_encoder(folder, PUBLISHED[name])
    tensors = load_file(folder / "model.safetensors")
    kept = {
        tensor.removeprefix("bert."): value
        for tensor, value in tensors.items()
        if not tensor.startswith("classifier")
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    content = dict(PUBLISHED[name])
    content["architectures"] = [
        content["architectures"][0].replace("ForSequenceClassification", "Model")
    ]
    del content["id2label"], content["label2id"]
    (folder / "config.json").write_text(json.dumps(content))


class Ours:
    """Our model of a base with a fresh head for three labels, and what it trains."""

    def __init__(self, folder, name, rules=None, method="tsd"):
        found = huggingface.read_config(folder)
        self.config = dataclasses.replace(found, num_labels=3)
        family = huggingface.family_of(found)
        key = jax.random.key(0)
        self.params = huggingface.load_params(folder, self.config, head_key=key)
        self.model = family.kind.network(self.config)
        self.name = functools.partial(
            huggingface.module_name, model_type=found.model_type
        )
        self.tokens, self.mask, self.types = inputs(PUBLISHED[name])
        self.spec = make_spec(
            self.model.apply,
            {"params": self.params},
            rules or [RULE, Full(pattern=family.head)],
            self.tokens,
            method=method,
        )

    def trained(self):
        """Move every leaf, frozen directions too, by random numbers."""
        trees = init(jax.random.key(0), self.spec, params=self.params)
        return jax.tree.map(
            jnp.add, trees, filled(1, jax.eval_shape(lambda: trees), 0.2)
        )

    def logits(self, trees):
        apply = jax.jit(adapted(self.model.apply), compiler_options=QUICK)
        variables = {"params": bind(self.params, *trees)}
        return np.asarray(apply(variables, self.tokens, None, self.mask, self.types))

    def of_torch(self, model):
        given = {"attention_mask": self.mask, "token_type_ids": self.types}
        given = {name: torch.from_numpy(x.astype(int)) for name, x in given.items()}
        with torch.no_grad():
            return model.eval()(torch.from_numpy(self.tokens), **given).logits.numpy()

    def places(self):
        kind = self.config.model_type
        return (
            huggingface.module_paths(self.params, kind),
            huggingface.tensor_paths(self.params, kind),
        )


def stock(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3
    )


@families
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stock_peft_gives_our_logits_and_we_read_it_back(tmp_path, name):
    base, adapter, again = (tmp_path / each for each in ("base", "adapter", "again"))
    base.mkdir()
    without_head(base, name)
    our = Ours(base, name)
    trees = our.trained()
    to_peft(
        adapter,
        *trees,
        our.name,
        base_model=str(base),
        params=our.params,
        task_type="SEQ_CLS",
    )
    expected = our.logits(trees)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing or unexpected key is a warning there
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(stock(base), adapter)
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    theirs = our.of_torch(model)
    np.testing.assert_allclose(theirs, expected, atol=TOLERANCE)
    untrained = our.logits((Trainable(adapters={}, full={}), {}))
    assert np.abs(untrained - expected).max() > 0.3

    model.save_pretrained(again)  # as stock PEFT has it, with names it presumes
    for folder in (adapter, again):
        found = from_peft(folder, *our.places())
        back = Ours(base, name, found.rules(directions=2))
        assert back.spec.full == our.spec.full
        start = found.start(jax.random.key(1), back.spec, params=back.params)
        for path, part in trees[0].full.items():
            np.testing.assert_array_equal(start[0].full[path].value, part.value)
        np.testing.assert_allclose(back.logits(start), expected, atol=TOLERANCE)


@families
def test_a_merged_checkpoint_gives_our_logits(tmp_path, name, capsys):
    base, run, out = (tmp_path / each for each in ("base", "run", "out"))
    base.mkdir()
    run.mkdir()
    without_head(base, name)
    our = Ours(base, name)
    trees = our.trained()
    file = run / "adapter.safetensors"
    save_adapter(file, *trees, our.spec, launched=True, base_model=str(base))
    labels = {"problem": "classification", "count": 3, "names": ["no", "yes", "so"]}
    (run / "config.json").write_text(json.dumps({"config": {}, "labels": labels}))
    assert main([str(run), "--to", "merged", "--out", str(out)]) == 0
    assert f"merged {6 * 3} modules, float32" in capsys.readouterr().out
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.id2label == {0: "no", 1: "yes", 2: "so"}
    assert model.config.hidden_dropout_prob == 0.1  # the base's own entries stay
    np.testing.assert_allclose(our.of_torch(model), our.logits(trees), atol=TOLERANCE)
    config = huggingface.read_config(out)
    assert (config.num_labels, config.label_names) == (3, ("no", "yes", "so"))
    assert huggingface.absent_head(out, config) == ()

    # The same from the PEFT adapter alone, whose labels have no names.
    adapter, other = tmp_path / "adapter", tmp_path / "other"
    assert main([str(run), "--to", "peft", "--out", str(adapter)]) == 0
    assert main([str(adapter), "--to", "merged", "--out", str(other)]) == 0
    same = auto.from_pretrained(other)
    np.testing.assert_allclose(our.of_torch(same), our.logits(trees), atol=TOLERANCE)


def test_a_merge_without_any_head_is_refused(tmp_path, capsys):
    base, file = tmp_path / "base", tmp_path / "adapter.safetensors"
    base.mkdir()
    without_head(base, "bert")
    our = Ours(base, "bert", [RULE])
    save_adapter(file, *our.trained(), our.spec, launched=True, base_model=str(base))
    assert main([str(file), "--to", "merged", "--out", str(tmp_path / "out")]) == 2
    assert "neither the base nor the adapter has a head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
