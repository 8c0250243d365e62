"""Well-known checkpoints have the tensors that transformers has for them."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import pytest
import transformers

from tests.helpers.published import CHECKPOINTS
from tsd_jax.huggingface import abstract_params, names, read_config

torch = pytest.importorskip("torch")


def loaded_names(published, experts):
    """Return {name: shape} as transformers 5 has them in memory: experts stacked.

    The kernels of gate and up become one there, gate first.
    """
    shapes, widths = {}, defaultdict(dict)
    for name, shape in published.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        name = re.sub(r"\.w([123])\.weight", _kinds, name)
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if found:
            widths[found[1], found[3]][int(found[2])] = shape
        else:
            shapes[name] = shape
    for (module, kind), each in widths.items():
        assert sorted(each) == list(range(experts))
        (shape,) = {*each.values()}
        if kind == "down":
            shapes[f"{module}.down_proj"] = (experts, *shape)
        elif kind == "gate":
            assert shape == widths[module, "up"][0]
            fused = (experts, 2 * shape[0], shape[1])
            shapes[f"{module}.gate_up_proj"] = fused
    return shapes


def _kinds(found):
    return f".{ {'1': 'gate', '2': 'down', '3': 'up'}[found[1]] }_proj.weight"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tensors_are_those_of_transformers(tmp_path, name):
    published = CHECKPOINTS[name]
    (tmp_path / "config.json").write_text(json.dumps(dict(published.config)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    wanted = {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert sum(each.numel() for each in model.parameters()) == published.parameters

    config = read_config(tmp_path)
    shapes = names.tensor_shapes(abstract_params(config), config.model_type)
    experts = 0 if config.experts is None else config.experts.num_experts
    assert loaded_names(shapes, experts) == wanted
    # Windows, and what else differs from layer to layer.
    types = getattr(theirs, "layer_types", None)
    if types is not None:
        assert [each == "sliding_attention" for each in types] == [*config.windowed]
