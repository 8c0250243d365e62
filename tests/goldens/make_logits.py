"""Write demo_logits.npz: the demo model's logits as torch and transformers give them.

    python tests/goldens/make_logits.py

Run it where torch is installed, whenever the demo's model has been made anew.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent.parent / "tsd_jax" / "demo" / "assets" / "model"


def main() -> None:
    """Compute two rows of random tokens, one of them padded on the left."""
    model = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, model.config.vocab_size, size=(2, 10))
    mask = np.ones(tokens.shape, bool)
    mask[1, :4] = False
    with torch.no_grad():
        logits = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask.astype(int)),
            position_ids=torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0)),
        ).logits
    np.savez_compressed(
        HERE / "demo_logits.npz",
        sha256=hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest(),
        tokens=tokens,
        mask=mask,
        logits=logits.numpy(),
    )


if __name__ == "__main__":
    main()
