"""The demo's tokenizer: byte-level BPE, trained on the village's own text.

A word includes the space before it, as in GPT-2, but a capitalised word does not: a
name is then the same token at the beginning of a line and inside a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# Merges stay within one piece; text that nothing here matches is a piece of its own.
PIECES = r"[A-Z][a-z]*| ?[a-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a tokenizer until every word has a token, or the vocabulary is full.

    Args:
      texts: to train on.
      vocab_size: limit, including the 256 bytes and three special tokens.

    Returns:
      A transformers tokenizer that puts BOS in front of a text.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def save_tokenizer(tokenizer: Any, folder: Path, context: int) -> None:
    """Write the files that AutoTokenizer reads, for a model with this context."""
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(str(folder))
