from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.hub import load_tokenizer, resolve


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


SETTINGS = b'{"model_type": "llama"}'
COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Answer as the hub does for a gated model that has one file."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        headers, status, content = {}, 200, SETTINGS
        if self.headers.get("Authorization") != "Bearer hf_secret":
            status, content = 401, b'{"error": "restricted"}'
            headers["X-Error-Code"] = "GatedRepo"
        elif "/tree/" in self.path:
            file = {"type": "file", "path": "config.json", "oid": "1", "size": 23}
            content = json.dumps([file]).encode()
        elif "/api/models" in self.path:
            files = [{"rfilename": "config.json"}]
            about = {"id": "owner/name", "sha": COMMIT, "siblings": files}
            content = json.dumps(about).encode()
        else:
            headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format, *args):
        del format, args


ASK = """
import os
from huggingface_hub import constants
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.hub import resolve

def ask():
    try:
        print((resolve("owner/name") / "config.json").read_text())
    except InputError as error:
        print(error)

ask()
os.environ["HF_TOKEN"] = "hf_secret"
ask()
constants.HF_HUB_OFFLINE = True
ask()
"""


def test_a_token_opens_a_gated_model_and_its_copy_serves_offline(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            cwd=Path(__file__).resolve().parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        server.shutdown()
        server.server_close()
    refused, *given = done.stdout.splitlines()
    assert (
        "'owner/name' is not a local folder, and downloading it from the hub failed"
        in refused
    )
    assert "log in with `hf auth login`" in refused
    assert given == [SETTINGS.decode()] * 2
