"""A config becomes typed settings: the same keys, the same types, nothing else."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_origin, get_type_hints

import pytest

from configs import default, demo, llama_tsd, minilm_sst2, stories_tsd
from tests.helpers.demo_runs import changed
from tsd_jax.app.config import RENAMED, flatten, keys, settings_from
from tsd_jax.app.settings import Settings
from tsd_jax.core.errors import InputError


def config():
    return demo.get_config().to_dict()


def plain(kind):
    """Return {name: type, section: {name: type}} of a dataclass."""
    return {
        name: plain(wanted) if dataclasses.is_dataclass(wanted) else wanted
        for name, wanted in get_type_hints(kind).items()
    }


def types_of(values):
    return {
        name: types_of(value) if isinstance(value, dict) else type(value)
        for name, value in values.items()
    }


def test_the_defaults_have_the_keys_and_types_of_the_settings():
    wanted = plain(Settings)

    def bare(types):
        return {
            name: bare(kind) if isinstance(kind, dict) else get_origin(kind) or kind
            for name, kind in types.items()
        }

    assert types_of(default.get_config().to_dict()) == bare(wanted)
    assert get_args(wanted["mesh"]) == (int, ...)
    assert get_args(wanted["model"]["added_tokens"]) == (str, ...)


def test_no_setting_has_a_default_of_its_own():
    sections = list(get_type_hints(Settings).values())
    for kind in [Settings, *filter(dataclasses.is_dataclass, sections)]:
        for field in dataclasses.fields(kind):
            assert field.default is dataclasses.MISSING, field.name
            assert field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("module", [demo, stories_tsd, llama_tsd, minilm_sst2])
def test_the_configs_become_settings(module):
    nested = module.get_config().to_dict()
    settings = settings_from(nested)
    flat = flatten(settings)
    assert list(flat) == keys()
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        assert value == (nested[section] if section else nested)[name]


def test_whole_numbers_stand_for_floats_and_lists_for_tuples():
    settings = settings_from(
        changed(config(), {"adapter__alpha": 16, "mesh": [-1, 1, 1]})
    )
    assert type(settings.adapter.alpha) is float
    assert settings.mesh == (-1, 1, 1)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("train__steps", "many", "a whole number"),
        ("train__steps", 10.0, "a whole number"),
        ("train__steps", True, "a whole number"),
        ("adapter__alpha", True, "a number"),
        ("adapter__alpha", None, "a number"),
        ("adapter__dora", 1, "True or False"),
        ("model__path", 3, "a string"),
        ("model__added_tokens", "<a>", "a tuple"),
        ("model__added_tokens", (1,), "a string"),
        ("mesh", (1.0, 1, 1), "a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(key, value, kind):
    name = key.replace("__", ".")
    with pytest.raises(InputError, match=f"^{name} must be {kind}, not "):
        settings_from(changed(config(), {key: value}))


def test_a_section_must_be_a_section():
    with pytest.raises(InputError, match="'model' is a section, not 'llama'"):
        settings_from(changed(config(), {"model": "llama"}))


def test_keys_that_are_unknown_or_missing_are_named():
    with pytest.raises(
        InputError, match=r"no key 'train\.step'; did you mean 'train\.steps'\?"
    ):
        settings_from(changed(config(), {"train__step": 5}))
    lacking = config()
    del lacking["train"]["steps"]
    with pytest.raises(InputError, match=r"lacks the key 'train\.steps'"):
        settings_from(lacking)


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("adapter__train_whole", "", "adapter.full_params"),
        ("optimizer__whole_learning_rate", 0.0, "optimizer.full_learning_rate"),
        ("settling", {"every": 5}, "auto_launch"),
    ],
)
def test_an_old_key_is_refused_with_the_new_one(old, value, new):
    name = old.replace("__", ".")
    with pytest.raises(InputError, match=f"^the config key '{name}' is now '{new}'$"):
        settings_from(changed(config(), {old: value}))


def test_renamed_keys_are_gone_and_their_new_names_are_there():
    assert not RENAMED.keys() & {*keys()}
    assert {*RENAMED.values()} <= {*keys(), "auto_launch"}
