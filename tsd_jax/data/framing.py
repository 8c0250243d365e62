"""What stands around a text: the tokens a tokenizer adds in front and at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from tsd_jax.core.errors import InputError


class Tokenizer(Protocol):
    """The part of a transformers tokenizer used here."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None if there is none."""

    def __call__(self, *texts: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Return the "input_ids" of a list of texts, or of two, for pairs."""
        ...


class Frame(NamedTuple):
    """Special tokens around a text.

    Attributes:
      front: what a tokenizer puts in front of a text by itself, such as BOS; () if
        nothing.
      end: what ends a text that is learned: EOS.
    """

    front: tuple[int, ...]
    end: tuple[int, ...]


# Long enough that no special token is taken for it, short enough for any length limit.
_PROBE = "a b"


def frame_of(tokenizer: Tokenizer) -> Frame:
    """Return the tokens around a text, as the tokenizer itself decides.

    What has a BOS token need not put it in front (`add_bos_token`, or a post-processor
    without it). EOS is added here, whether or not the tokenizer adds it: a model learns
    where a text ends from it alone.

    Args:
      tokenizer: of the model.

    Raises:
      InputError: the tokenizer writes a text otherwise where special tokens are around.
    """
    plain, framed = (
        list(
            tokenizer([_PROBE], add_special_tokens=added, verbose=False)["input_ids"][0]
        )
        for added in (False, True)
    )
    eos = tokenizer.eos_token_id
    end = () if eos is None else (eos,)
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return Frame(tuple(framed[:start]), end)
    raise InputError(
        f"the tokenizer turns {_PROBE!r} into {framed} with special tokens and into "
        f"{plain} without, which is not a part of it: use one of its fast kind"
    )


def begin(ids: list[int], frame: Frame) -> list[int]:
    """Return the ids of a text with the frame's front, unless they begin with it.

    Args:
      ids: of the text.
      frame: of its tokenizer.
    """
    front = list(frame.front)
    return ids if ids[: len(front)] == front else [*front, *ids]


def keep_end(ids: list[int], room: int, frame: Frame) -> list[int]:
    """Return at most `room` ids: the front, and as much of the end as fits.

    Args:
      ids: of a text that begins as `begin` makes it.
      room: how many may stay.
      frame: of the tokenizer.
    """
    if len(ids) <= room:
        return ids
    front = ids[: min(len(frame.front), room)]
    return front + ids[len(ids) - (room - len(front)) :]


class BoundedTokenizer:
    """A tokenizer that refuses texts with ids that a model has no rows for.

    Attributes of the tokenizer are its own.
    """

    def __init__(self, tokenizer: Any, rows: int) -> None:
        """Check the token that ends texts.

        Args:
          tokenizer: of transformers.
          rows: of the model's embedding.

        Raises:
          InputError: the model has no row for EOS.
        """
        self._tokenizer, self._rows = tokenizer, rows
        self._check([tokenizer.eos_token_id or 0])

    def __call__(self, *texts: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Return what the tokenizer does of a list of texts, or of two, for pairs.

        Raises:
          InputError: the model has no row for one of their ids.
        """
        encoded = self._tokenizer(*texts, **kwargs)
        for ids in encoded["input_ids"]:
            self._check(ids)
        return encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def _check(self, ids: list[int]) -> None:
        largest = max(ids, default=0)
        if largest >= self._rows:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"token {token!r} has id {largest}, and the model's embedding "
                f"{self._rows} rows: use the tokenizer that the model was trained "
                "with, or take the token out of it and name it in model.added_tokens"
            )
