"""Write decoders.npz: logits of small decoders as torch and transformers give them.

    PYTHONPATH=. python tests/goldens/make_decoders.py

Run it where torch is installed, whenever `tests/helpers/decoders.py` has changed. The
weights are not stored: a test makes them again from the names of the tensors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

from tests.helpers.decoders import GOLDEN_COLUMNS, PUBLISHED, inputs, write_decoder

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Compute the logits of every family, at some positions of three rows."""
    tokens, mask, positions = inputs()
    goldens = {}
    for family, published in PUBLISHED.items():
        with tempfile.TemporaryDirectory() as folder:
            write_decoder(Path(folder), published)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        model, info = loaded
        if any(info.values()):
            raise SystemExit(f"{family}: the tensors do not fit: {info}")
        with torch.no_grad():
            logits = model.eval()(
                torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask.astype(int)),
                position_ids=torch.from_numpy(positions),
            ).logits
        goldens[family] = logits.numpy()[:, GOLDEN_COLUMNS]
        print(f"{family}: logits up to {np.abs(goldens[family]).max():.1f}")
    np.savez_compressed(HERE / "decoders.npz", **goldens)


if __name__ == "__main__":
    main()
