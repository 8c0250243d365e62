"""Fine-tune a decoder or an encoder with LoRA, LoRA-Dash, LoRA-Init or LoRA-TSD.

    python train.py --config configs/demo.py --workdir runs/demo
    python train.py --config configs/llama_tsd.py --config.model.path=FOLDER --dry-run

This is the command `tsd-train` of an installed tsd_jax, for use in a checkout.
"""

import sys

from tsd_jax.app.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
