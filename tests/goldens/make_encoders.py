"""Write encoders.npz: logits of small encoders as torch and transformers give them.

    PYTHONPATH=. python tests/goldens/make_encoders.py

Run it where torch is installed, whenever `tests/helpers/encoders.py` has changed. The
weights are not stored: a test makes them again from the names of the tensors.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

from tests.helpers.encoders import PUBLISHED, inputs, write_encoder

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Compute the logits of every family, with padding and token types."""
    goldens = {}
    for name, published in PUBLISHED.items():
        with tempfile.TemporaryDirectory() as folder:
            write_encoder(Path(folder), published)
            auto = transformers.AutoModelForSequenceClassification
            model, info = auto.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        if any(info.values()):
            raise SystemExit(f"{name}: the tensors do not fit: {info}")
        tokens, mask, types = (torch.from_numpy(x) for x in inputs(published))
        with torch.no_grad():
            logits = model.eval()(
                tokens, attention_mask=mask.long(), token_type_ids=types
            ).logits
        goldens[name] = logits.numpy()
        print(f"{name}: logits up to {np.abs(goldens[name]).max():.1f}")
    np.savez_compressed(HERE / "encoders.npz", **goldens)


if __name__ == "__main__":
    main()
