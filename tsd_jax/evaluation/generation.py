"""Generation: prompts of any lengths, continued in batches of compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tsd_jax.core.errors import InputError
from tsd_jax.core.types import Batch
from tsd_jax.evaluation import decoding
from tsd_jax.evaluation.beams import Beams, search
from tsd_jax.evaluation.decoding import ApplyFn, PlaceCache, Rows
from tsd_jax.evaluation.sampling import Sampling
from tsd_jax.evaluation.scoring import PlaceFn, fetch

STOP_EVERY = 8
"""New tokens between two looks for stop strings."""

Decode = Callable[[list[int]], Any]
"""Token ids -> what they say."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How prompts are continued, in the words of transformers.

    By default greedily. A temperature above 0 samples; two beams or more search.

    Attributes:
      max_new_tokens: at least 1.
      eos_ids: tokens that end a text and are no part of it; there may be several.
      stop: strings that end a text and are no part of it.
      temperature: 0 takes the likeliest token; above 0, see `Sampling`.
      top_k: see `Sampling`.
      top_p: see `Sampling`.
      num_beams: 1 for no beam search.
      length_penalty: see `Beams`.
      early_stopping: see `Beams`.
    """

    max_new_tokens: int = 32
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self):
        """Refuse numbers out of range, and settings that do not go together."""
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} must be at least 1, not {getattr(self, name)}"
                )
        if "" in self.stop:
            raise InputError("stop has an empty string, which every text has: leave it")
        if self.sampling is not None and self.beams is not None:
            raise InputError(
                f"num_beams {self.num_beams} and temperature {self.temperature}: a "
                "beam search samples nothing; use one of them"
            )
        if self.beams is not None and self.stop:
            raise InputError(
                f"num_beams {self.num_beams} and stop {self.stop}: stop strings do not "
                "end a beam; use end tokens, or one beam"
            )
        self._check_unused(self.sampling, "temperature above 0", "top_k", "top_p")
        self._check_unused(
            self.beams, "num_beams above 1", "length_penalty", "early_stopping"
        )

    def _check_unused(self, used: Any, needed: str, *names: str) -> None:
        """Raise InputError where settings of an unused strategy are not the default."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if used is None and field.name in names and value != field.default:
                raise InputError(f"{field.name} {value} needs {needed}")

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn; None if they are not."""
        if self.temperature == 0:
            return None
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )

    @property
    def beams(self) -> Beams | None:
        """How beams are searched; None if there is one."""
        if self.num_beams == 1:
            return None
        return Beams(
            number=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
        )


class _Work(NamedTuple):
    """One batch, and what its tokens are chosen with."""

    apply_fn: ApplyFn
    variables: Mapping[str, Any]
    rows: Rows
    settings: Generation
    decode: Decode
    key: Array | None
    place_cache: PlaceCache


def _same(tree: Any) -> Any:
    return tree


def generate(
    apply_fn: ApplyFn,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    *,
    decode: Decode = list,
    key: Array | None = None,
    batch_size: int | None = None,
    place: PlaceFn = _same,
    place_cache: PlaceCache = _same,
) -> list[Any]:
    """Return what follows every prompt, in their order.

    Prompts of similar lengths share a batch, and are padded on the left to one of a few
    lengths. For each of these a program is compiled once (pass the same `apply_fn` and
    `place_cache` again). What follows a prompt does not depend on those beside it.

    Args:
      apply_fn: `model.apply`, plain or adapted, of a model called as
        `(variables, tokens, mask=mask, decode=True, mutable=["cache"])`, which keeps
        the keys and values of earlier tokens in the collection "cache".
      variables: of the model, with bound adapters if `apply_fn` is adapted.
      prompts: token ids, at least one each.
      settings: the strategy, and what ends a text.
      decode: makes a text of new token ids, such as `tokenizer.decode`; without it
        their list is returned.
      key: typed key to sample with.
      batch_size: prompts in a batch; None for all. A last batch is filled up.
      place: puts a batch on the devices.
      place_cache: gives a cache its shardings.

    Returns:
      What `decode` makes of the new tokens of each prompt, up to where they end.

    Raises:
      InputError: an argument is invalid or does not fit the others.
    """
    _check(prompts, settings, decode, key, batch_size)
    texts: list[Any] = [None] * len(prompts)
    for numbers in _batches(prompts, batch_size or len(prompts) or 1):
        batch = place(_padded(prompts, numbers))
        rows = Rows(**{name: jnp.asarray(array) for name, array in batch.items()})
        run = _search if settings.beams else _step
        made = run(_Work(apply_fn, variables, rows, settings, decode, key, place_cache))
        for number, ids in zip(numbers, made, strict=True):
            texts[number] = before_stop(decode(ids), settings.stop)
    return texts


def before_stop(text: Any, stop: Sequence[str]) -> Any:
    """Return the text up to the first of some strings; all of it if it has none."""
    found = [text.index(each) for each in stop if each in text]
    return text[: min(found)] if found else text


def padded_length(length: int) -> int:
    """Return the length to pad to: at most a quarter more, and four to an octave."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _check(
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    decode: Decode,
    key: Array | None,
    batch_size: int | None,
) -> None:
    """Refuse arguments that would generate nonsense."""
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(
                f"prompt {number} has no tokens: give it one, such as the one that "
                "begins a text"
            )
    if settings.sampling is not None and key is None:
        raise InputError("sampling at a temperature above 0 needs a key")
    if settings.stop and not isinstance(decode([]), str):
        raise InputError("stop strings need a `decode` that gives text")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield the numbers of prompts of similar lengths; the last one fills a batch."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        yield numbers + numbers[-1:] * (size - len(numbers))


def _padded(prompts: Sequence[Sequence[int]], numbers: list[int]) -> Batch:
    """Return prompts padded on the left, as the fields of `Rows`."""
    length = padded_length(max(len(prompts[number]) for number in numbers))
    tokens = np.zeros((len(numbers), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, number in enumerate(numbers):
        tokens[row, length - len(prompts[number]) :] = prompts[number]
        mask[row, length - len(prompts[number]) :] = True
    return {
        "tokens": tokens,
        "mask": mask,
        "numbers": np.asarray(numbers, np.int32)[:, None],
    }


def _step(work: _Work) -> list[list[int]]:
    """Return the new tokens of each row, chosen one by one."""
    settings, most = work.settings, work.settings.max_new_tokens
    state = decoding.start(
        work.apply_fn,
        work.variables,
        work.rows,
        max_new_tokens=most,
        place_cache=work.place_cache,
    )
    stopped = np.zeros(len(work.rows.tokens), bool)
    every = STOP_EVERY if settings.stop else most
    made: list[list[int]] = []
    for until in range(every, most + every, every):
        state = decoding.advance(
            work.apply_fn,
            work.variables,
            work.rows,
            state,
            stopped=stopped,
            until=np.int32(min(until, most)),
            eos_ids=np.asarray(settings.eos_ids, np.int32),
            sampling=settings.sampling,
            key=None if settings.sampling is None else work.key,
        )
        made = _cut(state.out, state.lengths)
        if settings.stop:
            texts = [work.decode(ids) for ids in made]
            stopped = np.array([before_stop(t, settings.stop) != t for t in texts])
            if (stopped | fetch(state.ended)).all():
                break
    return made


def _search(work: _Work) -> list[list[int]]:
    """Return the new tokens of each row, found by a beam search."""
    assert work.settings.beams is not None
    found = search(
        work.apply_fn,
        work.variables,
        work.rows,
        eos_ids=np.asarray(work.settings.eos_ids, np.int32),
        beams=work.settings.beams,
        max_new_tokens=work.settings.max_new_tokens,
        place_cache=work.place_cache,
    )
    return _cut(*found)


def _cut(tokens: Array, lengths: Array) -> list[list[int]]:
    """Return rows of tokens on the host, each up to its own length."""
    ids, ends = jax.tree.map(fetch, (tokens, lengths))
    return [row[:end].tolist() for row, end in zip(ids, ends, strict=True)]
