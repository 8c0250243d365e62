"""`python -m tests.helpers.tokenizers4 TEXTS FOLDER...`: ids in transformers 4.

TEXTS are a JSON list. Prints one line of JSON: its version, and for each folder the
ids of each text. Needs a transformers of version 4 in PYTHONPATH.
"""

from __future__ import annotations

import json
import sys

import transformers


def main(texts: str, *folders: str) -> None:
    made = [transformers.AutoTokenizer.from_pretrained(folder) for folder in folders]
    ids = [[each(text).input_ids for text in json.loads(texts)] for each in made]
    print(json.dumps([transformers.__version__, *ids]))


if __name__ == "__main__":
    main(*sys.argv[1:])
