"""The serving page from its first command to its last line of Python, with PEFT."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch  # pyright: ignore[reportMissingImports]

from tests.helpers.pages import ROOT, fences, read, run_python

SHORT = (
    "--config.train.steps=4",
    "--config.method.launch_step=2",
    "--config.eval.limit=8",
    "--config.adapter.pattern=layers/self_attn/q_proj/kernel",
)


def commands(page: str) -> list[list[str]]:
    """Return the page's commands that run Python, in order."""
    shell = [fence.body for fence in fences(read(page)) if fence.language == "bash"]
    lines = "".join(shell).replace("\\\n", " ").splitlines()
    return [words for words in map(shlex.split, lines) if words[:1] == ["python"]]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*resized during finetuning")
def test_the_serving_page(tmp_path, monkeypatch):
    for name in ("train.py", "configs", "tsd_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for page in ("docs/full_params.md", "docs/serving.md"):
        for _, *words in commands(page):
            short = SHORT if words[0] == "train.py" else ()
            subprocess.run([sys.executable, *words, *short], check=True)
    names = run_python("docs/serving.md", foreign=True)
    # The last model is the one of the grown vocabulary; its adapter changes something.
    rows = names["base"].get_input_embeddings().weight.shape[0]
    assert rows == len(names["tokenizer"])
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert names["merged"](tokens).logits.isfinite().all()
