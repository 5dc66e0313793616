"""Keys and values kept while sampling.

Every array of a cache holds the layers of one kind of attention. A window's layers hold a ring:
position p lies in slot `p mod C`, and C is the window (and what a row may be ahead of it), however
long the row becomes.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.models.config import DecoderConfig
from pgjax.types import pytree_dataclass


@pytree_dataclass
class PrefixCache:
    """The prompts' keys and values, shared by all sequences of a prompt.

    Attributes:
      keys, values: one array per kind of attention, in the model's compute dtype; C is the
        prompts' width, or the window where that is less.
      lengths: real tokens of each prompt.
    """

    keys: tuple[Float[Array, "L P kv_heads C D"], ...]
    values: tuple[Float[Array, "L P kv_heads C D"], ...]
    lengths: Int[Array, " P"]


@pytree_dataclass
class CompletionCache:
    """The completions' keys and values, every sequence being at the same step.

    The samples' axis lies behind the heads', so that samples of one prompt meet its shared prefix
    in one matrix product per prompt and head.

    Attributes:
      keys, values: one array per kind of attention. Step n of sequence (p, g), which holds
        position `lengths[p] + n`, lies in slot `n mod C`; C is the number of steps, or the window
        where that is less.
    """

    keys: tuple[Float[Array, "L P kv_heads G C D"], ...]
    values: tuple[Float[Array, "L P kv_heads G C D"], ...]


@pytree_dataclass
class SlotCache:
    """Keys and values of sequences that each are at a position of their own.

    Attributes:
      keys, values: one array per kind of attention; position p of slot s lies in `p mod C`.
    """

    keys: tuple[Float[Array, "L S kv_heads C D"], ...]
    values: tuple[Float[Array, "L S kv_heads C D"], ...]


AnyCache = TypeVar("AnyCache", PrefixCache, CompletionCache, SlotCache)


def layers_of_kind(config: DecoderConfig, kind: int) -> list[int]:
    """The layers whose keys and values lie in a cache's array number `kind`."""
    return [layer for layer, k in enumerate(config.kind_indices) if k == kind]


def by_layer(cache: AnyCache, config: DecoderConfig) -> AnyCache:
    """The same cache with an array for each layer, and its keys with the slots' axis last.

    A program that names its layers one by one then reads and writes each layer's array as it lies,
    where it would copy a slice out of the kind's, and multiplies queries with keys where it would
    transpose them first. The samples' axis of a completion cache is left out where there is one
    sample a prompt: products over an axis of size 1 would copy as well.
    """
    places: list[tuple[int, int]] = []
    for kind in config.kind_indices:
        places.append((kind, sum(k == kind for k, _ in places)))

    def split(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        layers = [arrays[kind][index] for kind, index in places]
        return tuple(x[:, :, 0] if x.ndim == 5 and x.shape[2] == 1 else x for x in layers)

    keys = tuple(x.swapaxes(-1, -2) for x in split(cache.keys))
    return dataclasses.replace(cache, keys=keys, values=split(cache.values))


def empty_completion_cache(
    config: DecoderConfig, *, num_prompts: int, num_samples: int, num_slots: int
) -> CompletionCache:
    """Zeros with room for `num_slots` tokens of each of `num_prompts · num_samples` sequences."""

    def zeros() -> tuple[Array, ...]:
        return tuple(
            jnp.zeros(
                (
                    *(len(layers_of_kind(config, index)), num_prompts, config.num_kv_heads),
                    *(num_samples, _least(num_slots, kind.window), config.head_dim),
                ),
                config.dtype,
            )
            for index, kind in enumerate(config.kinds)
        )

    return CompletionCache(keys=zeros(), values=zeros())


def empty_slot_cache(
    config: DecoderConfig, *, num_slots: int, capacity: int, lookahead: int = 1
) -> SlotCache:
    """Zeros for `num_slots` sequences.

    Args:
      config: of the decoder.
      num_slots: S.
      capacity: longest sequence, prompt and completion together.
      lookahead: most tokens that `extend` is given at once. A window's layers need that much more
        than their window, so that tokens taken back have not overwritten what is still seen.

    Raises:
      ValueError: a number below 1.
    """
    _checks.in_range("num_slots", num_slots, 1)
    _checks.in_range("capacity", capacity, 1)
    _checks.in_range("lookahead", lookahead, 1)

    def zeros() -> tuple[Array, ...]:
        result = []
        for index, kind in enumerate(config.kinds):
            window = None if kind.window is None else kind.window + lookahead - 1
            shape = (
                *(len(layers_of_kind(config, index)), num_slots, config.num_kv_heads),
                *(_least(capacity, window), config.head_dim),
            )
            result.append(jnp.zeros(shape, config.dtype))
        return tuple(result)

    return SlotCache(keys=zeros(), values=zeros())


def _least(size: int, window: int | None) -> int:
    return size if window is None else min(size, window)


def ring_positions(
    newest: Int[Array, "*rows"], capacity: int
) -> tuple[Int[Array, "*rows C"], Bool[Array, "*rows C"]]:
    """The position each slot of a ring holds when `newest` was written last, and whether it is one.

    Slot c holds the largest `p <= newest` with `p mod C = c`; below 0 it holds nothing.
    """
    newest = jnp.asarray(newest)[..., None]
    positions = newest - (newest - jnp.arange(capacity)) % capacity
    return positions, positions >= 0


def as_ring(rows: Array, newest: Int[Array, " P"], capacity: int, *, axis: int = -2) -> Array:
    """Rows that hold position p in slot `p mod T`, as rings of another capacity.

    Args:
      rows: `[*L, P, kv_heads, T, D]`, or `[*L, P, kv_heads, D, T]` with axis -1.
      newest: last position of each row.
      capacity: C, which takes the place of T.
      axis: of the slots, -2 or -1.
    """
    positions, _ = ring_positions(newest, capacity)
    source = jnp.expand_dims(positions % rows.shape[axis], (1, -3 - axis))
    return jnp.take_along_axis(rows, source[(None,) * (rows.ndim - 4)], axis=axis)


def insert_prefix(
    cache: SlotCache, prefix: PrefixCache, rows: Int[Array, " R"], slots: Int[Array, " R"]
) -> SlotCache:
    """Copies prompts into slots: row `rows[i]` of the prefix into slot `slots[i]`.

    Args:
      cache: with room for at least the prompts' width.
      prefix: from `FunctionalDecoder.prefill`; both by layer or neither, see `by_layer`.
      rows: in [0, P), in any order and as often as wanted.
      slots: all different; those of S or more are left out.

    Returns:
      the cache, other slots as they were. The sequences' lengths are the caller's to keep.

    Raises:
      ValueError: ranks or dtypes, or different numbers of rows and slots.
    """
    _checks.rank("rows", rows, 1)
    _checks.rank("slots", slots, 1)
    _checks.integer(rows=rows, slots=slots)
    _checks.same_shape(rows=rows, slots=slots)
    newest = prefix.lengths[rows] - 1

    def insert(into: Array, source: Array, axis: int) -> Array:
        whole = (slice(None),) * (into.ndim - 4)
        ring = as_ring(source[*whole, rows], newest, into.shape[axis], axis=axis)
        return into.at[*whole, slots].set(ring, mode="drop")

    keys_axis = -2 if cache.keys[0].ndim == 5 else -1
    return SlotCache(
        keys=tuple(insert(*x, keys_axis) for x in zip(cache.keys, prefix.keys, strict=True)),
        values=tuple(insert(*x, -2) for x in zip(cache.values, prefix.values, strict=True)),
    )
