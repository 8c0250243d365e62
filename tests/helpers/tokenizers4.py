"""`python -m tests.helpers.tokenizers4 FOLDER TEXT...`: ids as transformers 4 has them.

Prints its version, and the ids of each text, as one line of JSON. Needs a transformers
of version 4 in PYTHONPATH.
"""

from __future__ import annotations

import json
import sys

import transformers


def main(folder: str, *texts: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    print(
        json.dumps([transformers.__version__, *(tokenizer(t).input_ids for t in texts)])
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
