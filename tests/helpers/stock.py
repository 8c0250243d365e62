"""Stock models of transformers: small, random, and their logits. Needs torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

from tsd_jax import huggingface


def random_torch_model(folder):
    """Make the stock model of a config.json; norms and biases too are random."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.3
    config._experts_implementation = "eager"  # the others ask for even sizes
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(0.5, 0.5)
            elif parameter.std() < 0.1 or "gate.weight" in name:
                parameter.normal_(0, 0.3)
    return model.float().eval()


def stock_model(
    content: dict[str, Any], folder: Path, make: Callable = random_torch_model
) -> tuple[Any, Path]:
    """Return the stock model of a published config, and a folder it is written to.

    What transformers writes must be read as the published form is.
    """
    published, saved = folder / "published", folder / "saved"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(content))
    model = make(published)
    model.save_pretrained(saved)
    assert huggingface.read_config(saved) == huggingface.read_config(published)
    return model, saved


def torch_logits(model, tokens, mask=None, positions=None) -> np.ndarray:
    """Return the logits of a torch model, (B, T, V)."""
    arguments = {"attention_mask": mask, "position_ids": positions}
    given = {k: torch.from_numpy(v) for k, v in arguments.items() if v is not None}
    with torch.no_grad():
        return model(torch.from_numpy(tokens), **given).logits.numpy()
