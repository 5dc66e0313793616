"""Grain pipelines: endless, freshly shuffled batches whose position can be saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pgjax import _checks
from pgjax.tasks import random_calculation

if TYPE_CHECKING:
    import grain


class PromptSource(Protocol):
    """Items in random access, with every item's level known beforehand.

    An item is a mapping with `id`, `prompt`, `answer`, `level`, and for supervised training
    `direct` and `worked`. Answers are numbers, or texts that only a verifier can compare.
    """

    @property
    def levels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def _select(source: PromptSource, levels: Sequence[int] | None) -> np.ndarray:
    """Indices of the items with a wanted level; raises ValueError where a level has none."""
    present = np.unique(source.levels)
    if not len(source) or (levels is not None and not len(levels)):
        raise ValueError(f"levels: nothing selected, got levels={levels} of {len(source)} items")
    if levels is None:
        return np.arange(len(source))
    missing = sorted(set(levels) - set(present.tolist()))
    if missing:
        raise ValueError(f"levels: no items of {missing}; the source has {present.tolist()}")
    return np.flatnonzero(np.isin(source.levels, list(levels)))


def _batches(
    indices: np.ndarray,
    collate: Callable[[list[int], list[int]], dict[str, np.ndarray]],
    *,
    batch_size: int,
    seed: int,
    shard_index: int,
    shard_count: int,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Batches that `collate` makes of a shard's rows, and of those of all shards."""
    import grain

    _checks.in_range("batch_size", batch_size, 1)
    _checks.in_range("seed", seed, 0, 2**32 - 1)
    _checks.in_range("shard_count", shard_count, 1)
    _checks.in_range("shard_index", shard_index, 0, shard_count - 1)
    # Grain shuffles by a short cipher of the index, in whose output the order of the source (levels
    # in turn) still shows; a fixed permutation beneath it hides that order.
    mixed = np.random.default_rng((seed, len(indices))).permutation(indices)
    dataset = grain.MapDataset.source(mixed).seed(seed).shuffle().repeat()
    first = shard_index * batch_size

    def own(rows: Sequence[Any]) -> dict[str, np.ndarray]:
        every = [int(i) for i in rows]
        return collate(every[first : first + batch_size], every)

    batches = dataset.batch(batch_size * shard_count, drop_remainder=True, batch_fn=own)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(batches.to_iter_dataset(options))


def _buckets(prompt_length: int | Sequence[int]) -> tuple[int, ...]:
    """The allowed widths, in ascending order."""
    given = tuple(prompt_length) if isinstance(prompt_length, Sequence) else (prompt_length,)
    if not given:
        raise ValueError("prompt_length: expected at least one width, got none")
    for width in given:
        _checks.in_range("prompt_length", width, 1)
    return tuple(sorted(given))


def _answers(answers: list[Any]) -> dict[str, np.ndarray]:
    """Numbers as an array; texts are no array and are looked up by the item's id."""
    if any(isinstance(a, str) for a in answers):
        return {}
    whole = all(isinstance(a, int) for a in answers)
    return {"answers": np.array(answers, np.int32 if whole else np.float64)}


def _seen(rows: Sequence[int], every: Sequence[int], buckets: tuple[int, ...]) -> Sequence[int]:
    """The rows whose lengths decide a batch's width: where there is a choice, those of all shards,
    which have to agree on it."""
    return every if len(buckets) > 1 else rows


def _prompts(
    source: PromptSource,
    rows: Sequence[int],
    every: Sequence[int],
    *,
    buckets: tuple[int, ...],
    encode: Callable[[str], Any],
    pad: int,
) -> dict[str, np.ndarray]:
    items = [source[i] for i in rows]
    prompts = [item["prompt"] for item in items]
    seen = {source[i]["prompt"] for i in _seen(rows, every, buckets)}
    tokens = {prompt: encode(prompt) for prompt in seen}
    longest = max(len(ids) for ids in tokens.values())
    width = next((w for w in buckets if w >= longest), buckets[-1])
    return {
        **random_calculation.prompt_batch(
            prompts, length=width, encode=tokens.__getitem__, pad=pad
        ),
        **_answers([item["answer"] for item in items]),
        "levels": np.array([item["level"] for item in items], np.int32),
        "ids": np.array(rows, np.int32),
    }


def sft_loader(
    source: PromptSource,
    *,
    length: int,
    batch_size: int,
    worked_probability: float,
    seed: int,
    levels: Sequence[int] | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    encode: Callable[[str], Any] = random_calculation.encode,
    eos: int = random_calculation.EOS,
    pad: int = random_calculation.PAD,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches of demonstrations.

    Every pass visits each selected item once, in a new order; batches run across the border of
    two passes. Whether an item shows its worked or its direct response is drawn once from the
    seed and the item's index, and stays the same in every pass.

    Args:
      source: items in random access.
      length: T, width of the rows; a row that does not fit raises when it is reached.
      batch_size: B, rows in this shard's batches.
      worked_probability: probability of the worked response, in [0, 1].
      seed: in [0, 2^32).
      levels: which items; None for all.
      shard_index: which of `shard_count` equal parts of each global batch, for training with
        several processes (`parallel.process_shard`); the parts in order are what one process
        would have, and so is the position, which is the same for all.
      shard_count: number of parts.
      encode: text to ids, without special tokens.
      eos: id of the end of sequence.
      pad: id of padding.

    Returns:
      An iterator with `get_state() -> dict` (plain integers, JSON-serialisable) and
      `set_state(state)`, after which it continues exactly. It yields NumPy arrays `tokens` int32
      `[B, T]`, `mask` bool `[B, T]` (true on response tokens and EOS), `ids` int32 `[B]`.

    Raises:
      ValueError: options out of range, or a level without items.
    """
    _checks.in_range("worked_probability", worked_probability, 0, 1)
    _checks.in_range("length", length, 1)
    indices = _select(source, levels)
    _checks.in_range("seed", seed, 0, 2**32 - 1)
    worked = np.random.default_rng(seed).random(len(source)) < worked_probability

    def collate(rows: list[int], every: list[int]) -> dict[str, np.ndarray]:
        items = [source[i] for i in rows]
        responses = [
            item["worked" if worked[i] else "direct"] for i, item in zip(rows, items, strict=True)
        ]
        batch = random_calculation.token_batch(
            [item["prompt"] for item in items],
            responses,
            length=length,
            encode=encode,
            eos=eos,
            pad=pad,
        )
        return {**batch, "ids": np.array(rows, np.int32)}

    return _batches(
        indices,
        collate,
        batch_size=batch_size,
        seed=seed,
        shard_index=shard_index,
        shard_count=shard_count,
    )


def examples_loader(
    source: PromptSource,
    *,
    encode: Callable[[Mapping[str, Any]], Sequence[np.ndarray]],
    length: int | Sequence[int],
    batch_size: int,
    seed: int,
    levels: Sequence[int] | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    pad: int = random_calculation.PAD,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches of demonstrations whose tokens and mask a function makes of each item.

    It is `sft_loader` for rows that are more than a prompt and a response, such as conversations.

    Args:
      source: items in random access.
      encode: an item to `tokens` int `[N]` and `mask` bool `[N]`, true on what is learned; what
        else it returns is ignored, so a `chat.Conversation` will do.
      length: T, width of the rows, or several allowed widths of which the smallest that holds a
        batch is taken; a row that does not fit raises when it is reached.
      batch_size: B, rows in this shard's batches.
      seed: in [0, 2^32).
      levels: which items; None for all.
      shard_index: which of `shard_count` equal parts of each global batch, see `sft_loader`.
      shard_count: number of parts.
      pad: id of padding.

    Returns:
      An iterator with `get_state` and `set_state` like `sft_loader`'s. It yields NumPy arrays
      `tokens` int32 `[B, T]`, `mask` bool `[B, T]`, `ids` int32 `[B]`.

    Raises:
      ValueError: options out of range, or a level without items.
    """
    widths = _buckets(length)

    def collate(rows: list[int], every: list[int]) -> dict[str, np.ndarray]:
        found = {i: encode(source[i]) for i in _seen(rows, every, widths)}
        encoded = [found[i] for i in rows]
        longest = max(len(parts[0]) for parts in found.values())
        width = next((w for w in widths if w >= longest), None)
        if width is None:
            raise ValueError(f"length: an example takes {longest} tokens, got {widths[-1]}")
        batch = {
            "tokens": np.full((len(rows), width), pad, np.int32),
            "mask": np.zeros((len(rows), width), np.bool_),
            "ids": np.array(rows, np.int32),
        }
        for row, (tokens, mask, *_) in enumerate(encoded):
            batch["tokens"][row, : len(tokens)] = tokens
            batch["mask"][row, : len(mask)] = mask
        return batch

    return _batches(
        _select(source, levels),
        collate,
        batch_size=batch_size,
        seed=seed,
        shard_index=shard_index,
        shard_count=shard_count,
    )


def prompts_loader(
    source: PromptSource,
    *,
    prompt_length: int | Sequence[int],
    num_prompts: int,
    seed: int,
    levels: Sequence[int] | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    encode: Callable[[str], Any] = random_calculation.encode,
    pad: int = random_calculation.PAD,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches of prompts to sample from.

    Every pass visits each selected item once, in a new order; batches run across the border of
    two passes.

    Args:
      source: items in random access.
      prompt_length: Tp, width of the rows, or several allowed widths (buckets, a program is
        compiled for each) of which the smallest that holds a batch is taken; a prompt that does
        not fit raises when it is reached.
      num_prompts: P, prompts in this shard's batches.
      seed: in [0, 2^32).
      levels: which items; None for all.
      shard_index: which of `shard_count` equal parts of each global batch, see `sft_loader`.
      shard_count: number of parts.
      encode: text to ids, without special tokens.
      pad: id of padding.

    Returns:
      An iterator with `get_state() -> dict` (plain integers, JSON-serialisable) and
      `set_state(state)`, after which it continues exactly. It yields NumPy arrays `prompts` int32
      `[P, Tp]` (right-padded), `prompt_lengths` int32 `[P]`, `answers` int32 or float64 `[P]`,
      `levels` int32 `[P]`, `ids` int32 `[P]`. Where answers are texts there is no `answers`: look
      them up by id, as `source[id]["answer"]`.

    Raises:
      ValueError: options out of range, or a level without items.
    """
    buckets = _buckets(prompt_length)
    indices = _select(source, levels)

    def collate(rows: list[int], every: list[int]) -> dict[str, np.ndarray]:
        return _prompts(source, rows, every, buckets=buckets, encode=encode, pad=pad)

    return _batches(
        indices,
        collate,
        batch_size=num_prompts,
        seed=seed,
        shard_index=shard_index,
        shard_count=shard_count,
    )


def prompt_arrays(
    source: PromptSource,
    *,
    prompt_length: int | Sequence[int],
    levels: Sequence[int] | None = None,
    per_level: int | None = None,
    encode: Callable[[str], Any] = random_calculation.encode,
    pad: int = random_calculation.PAD,
) -> dict[str, np.ndarray]:
    """All selected prompts at once, in the source's order: what an evaluation needs.

    Args:
      source: items in random access.
      prompt_length: Tp, width of the rows, or several allowed widths.
      levels: which items; None for all.
      per_level: keep only the first so many of each level; None for all.
      encode: text to ids, without special tokens.
      pad: id of padding.

    Returns:
      The arrays that `prompts_loader` yields.

    Raises:
      ValueError: a level without items or with fewer than `per_level`, or a prompt that does not
        fit.
    """
    buckets = _buckets(prompt_length)
    indices = _select(source, levels)
    if per_level is not None:
        _checks.in_range("per_level", per_level, 1)
        kept = []
        for level in np.unique(source.levels[indices]):
            of_level = indices[source.levels[indices] == level]
            if len(of_level) < per_level:
                raise ValueError(
                    f"per_level: expected at most the {len(of_level)} items of level {level}, "
                    f"got {per_level}"
                )
            kept.append(of_level[:per_level])
        indices = np.sort(np.concatenate(kept))
    rows = indices.tolist()
    return _prompts(source, rows, rows, buckets=buckets, encode=encode, pad=pad)
