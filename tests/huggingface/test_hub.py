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

from tests.helpers.hub_cache import cached
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.hub import resolve, resolve_adapter


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

    def fetch(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, allow_patterns, ignore_patterns))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("some-owner/Some.Name-7b") == tmp_path
    [(name, revision, allowed, ignored)] = asked
    assert revision is None
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


SHARDS = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
FILES = {
    "config.json": "{}",
    "model.safetensors.index.json": json.dumps({"weight_map": SHARDS}),
    "model-1.safetensors": "",
    "model-2.safetensors": "",
}


def test_a_revision_is_a_branch_or_a_commit(tmp_path, monkeypatch):
    cached(monkeypatch, tmp_path, "owner/name", FILES)
    other = cached(monkeypatch, tmp_path, "owner/name", FILES, "b" * 40, ref="v2")
    assert resolve("owner/name").name == "a" * 40
    assert resolve("owner/name", "v2") == other
    assert resolve("owner/name", "b" * 40) == other
    with pytest.raises(InputError, match="at revision 'v3' failed"):
        resolve("owner/name", "v3")
    with pytest.raises(InputError, match=r"'v2' is for a hub id, but .* leave the rev"):
        resolve(tmp_path, "v2")


@pytest.mark.parametrize("missing", [*SHARDS.values(), "config.json"])
def test_a_copy_that_lacks_a_file_is_told(tmp_path, monkeypatch, missing):
    files = {name: text for name, text in FILES.items() if name != missing}
    folder = cached(monkeypatch, tmp_path, "owner/name", files)
    line = rf"'owner/name' lacks {missing} in {folder}: .*`hf download owner/name`"
    with pytest.raises(InputError, match=line) as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)
    assert huggingface_hub.try_to_load_from_cache("owner/name", missing) is None
    held = huggingface_hub.snapshot_download("owner/name", local_files_only=True)
    assert Path(held) == folder  # the client itself says nothing


def test_a_blob_that_was_removed_is_missing(tmp_path, monkeypatch):
    folder = cached(monkeypatch, tmp_path, "owner/name", FILES)
    (folder / "model-2.safetensors").resolve().unlink()
    with pytest.raises(InputError, match=r"lacks model-2\.safetensors"):
        resolve("owner/name")


ADAPTER = {"adapter_config.json": "{}", "adapter_model.safetensors": ""}


def test_an_adapter_comes_from_the_hub_or_a_path(tmp_path, monkeypatch):
    folder = cached(monkeypatch, tmp_path / "hub", "owner/adapter", ADAPTER)
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter("owner/adapter") == folder
    assert resolve_adapter(tmp_path) == tmp_path
    assert resolve_adapter("hub/none") == Path("hub/none")  # for others to refuse
    with pytest.raises(InputError, match="adapter 'owner/none' is not a local folder"):
        resolve_adapter("owner/none")


@pytest.mark.parametrize("missing", ADAPTER)
def test_an_adapter_that_lacks_a_file_is_told(tmp_path, monkeypatch, missing):
    files = {name: text for name, text in ADAPTER.items() if name != missing}
    cached(monkeypatch, tmp_path, "owner/adapter", files)
    with pytest.raises(InputError, match=rf"adapter 'owner/adapter' lacks {missing}"):
        resolve_adapter("owner/adapter")
