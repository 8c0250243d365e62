from __future__ import annotations

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import model_folder


def names(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def fill(folder, *files: str, text: str = "x"):
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).write_text(text)
    return folder


def test_companions_are_everything_but_weights_and_adapters(tmp_path):
    base = fill(
        tmp_path / "base",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "adapter_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "README.md",
    )
    (base / "folder.json").mkdir()
    fill(base / "additional_chat_templates", "tool_use.jinja")
    target = fill(tmp_path / "target")
    model_folder.copy_companions(base, target)
    assert names(target / "additional_chat_templates") == {"tool_use.jinja"}
    assert names(target) == {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "additional_chat_templates",
    }


def test_one_tokenizer_replaces_another(tmp_path):
    old = fill(tmp_path / "old", "tokenizer.json", "merges.txt", "config.json")
    new = fill(tmp_path / "new", "tokenizer.json", "added_tokens.json", text="new")
    assert model_folder.has_tokenizer(new)
    model_folder.copy_tokenizer(new, old)
    assert names(old) == {"tokenizer.json", "added_tokens.json", "config.json"}
    assert (old / "tokenizer.json").read_text() == "new"
    assert not model_folder.has_tokenizer(fill(tmp_path / "none", "config.json"))
    fill(new / "additional_chat_templates", "rag.jinja")
    model_folder.copy_tokenizer(new, old)
    assert names(old / "additional_chat_templates") == {"rag.jinja"}


def test_a_staged_folder_appears_at_the_end(tmp_path):
    with model_folder.staged_folder(tmp_path / "out") as part:
        (part / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"file"}


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyError("bug")])
def test_a_failure_leaves_no_folder(tmp_path, fault):
    kind = InputError if isinstance(fault, OSError) else KeyError

    def write():
        with model_folder.staged_folder(tmp_path / "out") as part:
            (part / "file").write_text("x")
            raise fault

    with pytest.raises(kind):
        write()
    assert names(tmp_path) == set()


def test_nothing_is_overwritten(tmp_path):
    base = fill(tmp_path / "base", "config.json")
    model_folder.check_new_folder(tmp_path / "new" / "deep", base)
    model_folder.check_new_folder(fill(tmp_path / "empty"), base)
    for folder, told in {
        base: "the base's own folder",
        fill(tmp_path / "full", "file"): "is not empty",
        base / "config.json" / "deep": "is a file",
    }.items():
        with pytest.raises(InputError, match=told):
            model_folder.check_new_folder(folder, base)
    with pytest.raises(InputError, match="does not exist"):
        model_folder.check_new_folder(tmp_path / "new", tmp_path / "nowhere")
