"""Vectors of integers that were seen, each with a number of its own: open addressing, under `jit`.

A slot found here is the index of whatever arrays one keeps beside the set: costs, parents, values.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pgjax import _checks


class HashSet(NamedTuple):
    """A set of vectors.

    Attributes:
      keys: int32 `[C, S]`, meaningful where `used` is.
      used: bool `[C]`.
      overflowed: a vector did not fit, at some time.
    """

    keys: Int[Array, "C S"]
    used: Bool[Array, " C"]
    overflowed: Bool[Array, ""]


def empty(size: int, *, capacity: int) -> HashSet:
    """A set without elements.

    Args:
      size: S ≥ 1, of the vectors.
      capacity: C ≥ 1; finding takes about two looks while half of it is in use, many more where
        nearly all is.

    Raises:
      ValueError: a number below 1.
    """
    _checks.in_range("size", size, 1)
    _checks.in_range("capacity", capacity, 1)
    return HashSet(
        jnp.zeros((capacity, size), jnp.int32), jnp.zeros(capacity, bool), jnp.bool_(False)
    )


def singleton(key: Int[Array, " S"], *, capacity: int) -> tuple[HashSet, Int[Array, ""]]:
    """The set of one vector, and its slot.

    Raises:
      ValueError: not a vector of integers, a `capacity` below 1.
    """
    _checks.rank("key", key, 1)
    table = empty(jnp.shape(key)[0], capacity=capacity)
    _checks.integer(key=key)
    slot = hashed(jnp.asarray(key)[None])[0] % capacity
    table = table._replace(keys=table.keys.at[slot].set(key), used=table.used.at[slot].set(True))
    return table, slot


def find(table: HashSet, keys: Int[Array, "K S"]) -> tuple[Int[Array, " K"], Bool[Array, " K"]]:
    """Where vectors are.

    Args:
      table: the set.
      keys: int32 `[K, S]`.

    Returns:
      slots int32 `[K]`, C where a vector is not there; bool `[K]`, whether it is.

    Raises:
      ValueError: wrong rank, size or dtype.
    """
    _checked(table, keys)
    capacity = table.used.shape[0]

    def look(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        slot, searching, looks = state
        searching &= table.used[slot] & ~_equal(table, slot, keys)
        return jnp.where(searching, (slot + 1) % capacity, slot), searching, looks + 1

    start = hashed(keys) % capacity, jnp.ones(jnp.shape(keys)[0], bool), jnp.int32(0)
    slot, searching, _ = jax.lax.while_loop(
        lambda state: state[1].any() & (state[2] < capacity), look, start
    )
    there = ~searching & table.used[slot]
    return jnp.where(there, slot, capacity), there


def insert_many(
    table: HashSet, keys: Int[Array, "K S"], *, where: Bool[Array, " K"] | None = None
) -> tuple[HashSet, Int[Array, " K"], Bool[Array, " K"]]:
    """The set with more vectors; equal ones, in it or among the new ones, are one.

    All look at their slots at once; of those that want the same free one, the first gets it and the
    others look again.

    Args:
      table: the set.
      keys: int32 `[K, S]`.
      where: bool `[K]`, which to insert; None: all.

    Returns:
      the new set; the slot of each vector, int32 `[K]`, C where it was not to be inserted or did
      not fit (`overflowed` is then true); and bool `[K]`, whether it is new, for one of equal ones.

    Raises:
      ValueError: wrong ranks, sizes or dtypes.
    """
    _checked(table, keys)
    capacity = table.used.shape[0]
    wanted = jnp.ones(jnp.shape(keys)[0], bool)
    if where is not None:
        _checks.boolean(where=where)
        _checks.same_shape(keys=wanted, where=where)
        wanted = jnp.asarray(where)
    keys = jnp.asarray(keys, jnp.int32)

    def look(state: tuple[HashSet, Array, Array, Array, Array]) -> tuple:
        table, slot, searching, new, looks = state
        used = table.used[slot]
        won = first_of(slot, searching & ~used, num=capacity)
        mine = jnp.where(won, slot, capacity)
        found = used & _equal(table, slot, keys)
        table = table._replace(
            keys=table.keys.at[mine].set(keys, mode="drop"),
            used=table.used.at[mine].set(True, mode="drop"),
        )
        searching &= ~(won | found)
        # Who has lost a free slot looks at it again: its winner may have been the same vector.
        slot = jnp.where(searching & used, (slot + 1) % capacity, slot)
        return table, slot, searching, new | won, looks + 1

    start = table, hashed(keys) % capacity, wanted, jnp.zeros_like(wanted), jnp.int32(0)
    # A slot is looked at twice at most: once free and lost, once used.
    table, slot, searching, new, _ = jax.lax.while_loop(
        lambda state: state[2].any() & (state[4] < 2 * capacity), look, start
    )
    table = table._replace(overflowed=table.overflowed | searching.any())
    return table, jnp.where(wanted & ~searching, slot, capacity), new


def first_of(ids: Int[Array, " K"], where: Bool[Array, " K"], *, num: int) -> Bool[Array, " K"]:
    """Which are the first of their id among those that count; ids are in [0, num)."""
    order = jnp.argsort(jnp.where(where, ids, num), stable=True)
    in_order = jnp.where(where, ids, num)[order]
    first = jnp.concatenate([jnp.ones(1, bool), in_order[1:] != in_order[:-1]])
    return jnp.zeros_like(where).at[order].set(first) & where


def hashed(keys: Int[Array, "K S"]) -> Int[Array, " K"]:
    """A number in [0, 2³¹) for each vector, spread evenly also where vectors differ by little."""
    code = jnp.full(jnp.shape(keys)[0], 0x811C9DC5, jnp.uint32)
    for column in jnp.asarray(keys).T.astype(jnp.uint32):
        code = (code ^ column) * jnp.uint32(0x01000193)
        code = code ^ (code >> 15)
    code = code * jnp.uint32(0x85EBCA6B)
    return ((code ^ (code >> 13)) >> 1).astype(jnp.int32)


def _equal(table: HashSet, slot: Array, keys: Array) -> Array:
    return jnp.all(table.keys[slot] == keys, axis=-1)


def _checked(table: HashSet, keys: Array) -> None:
    _checks.rank("keys", keys, 2)
    _checks.integer(keys=keys)
    size = table.keys.shape[1]
    if jnp.shape(keys)[1] != size:
        raise ValueError(f"keys: expected vectors of {size} integers, got shape {jnp.shape(keys)}")
