from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.models.huggingface.source import load_tokenizer, resolve


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.usefixtures("no_hub")
def test_an_existing_folder_wins(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "path",
    [
        "/no/such",
        "./owner/name",
        "../owner/name",
        "~/name",
        "name",
        "a/b/c",
        "here/missing",
        "owner/name/",
        "owner\\name",
        Path("owner") / "sub" / "name",
    ],
)
def test_a_path_is_never_sent_to_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=r"model folder .* does not exist") as caught:
        resolve(path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_hub")
def test_no_name_is_not_the_working_folder():
    with pytest.raises(InputError, match="no model"):
        resolve("")


@pytest.mark.usefixtures("no_hub")
def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match="is a file"):
        resolve(file)


def test_an_id_is_fetched_without_torch_weights(tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("some-owner/Some.Name-7b") == tmp_path
    [(name, allowed, ignored)] = asked
    assert name == "some-owner/Some.Name-7b"
    assert "*.safetensors" in allowed
    assert not {"*", "*.bin", "*.pth"} & {*allowed}
    assert ignored == ["original/*"]


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"'owner/name'.*local folder") as caught:
        resolve("owner/name")  # the tests run offline
    assert "\n" not in str(caught.value)


def test_a_tokenizer_is_loaded_from_its_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1, "hello": 2, "world": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded("world hello")["input_ids"] == [3, 2]
    assert loaded.eos_token_id == 1


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path} has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(InputError, match=rf"tokenizer in {tmp_path}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
