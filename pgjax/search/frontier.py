"""What waits to be looked at, the smallest key first: arrays of a fixed size, under `jit`.

Items lie in the order in which they came and a key of infinity marks those that have left, so the
least key is found in one pass over the array, which vectorises where a heap would not, and equal
keys leave in the order of arrival. Where the array is at its end, the gaps close.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax._arrays import widened


class Frontier(NamedTuple):
    """Items that wait.

    Attributes:
      keys: f32 `[C]`; infinite where nothing waits.
      items: a pytree of arrays `[C, ...]`.
      end: int32, behind the last item that came.
      overflowed: an item did not fit, at some time.
    """

    keys: Float[Array, " C"]
    items: Any
    end: Int[Array, ""]
    overflowed: Bool[Array, ""]


class Popped(NamedTuple):
    """What left a frontier, `[K]` each; where `valid` is false, nothing did.

    Attributes:
      keys: in ascending order, infinite where not valid.
      items: a pytree of arrays `[K, ...]`.
      valid: bool.
    """

    keys: Float[Array, " K"]
    items: Any
    valid: Bool[Array, " K"]


def empty(like: Any, *, capacity: int) -> Frontier:
    """A frontier on which nothing waits.

    Args:
      like: one item, a pytree of arrays; gives shapes and dtypes.
      capacity: C ≥ 1, how many can wait at once.

    Raises:
      ValueError: a `capacity` below 1.
    """
    _checks.in_range("capacity", capacity, 1)
    items = jax.tree.map(
        lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)),
        like,
    )
    return Frontier(jnp.full(capacity, jnp.inf, jnp.float32), items, jnp.int32(0), jnp.bool_(False))


def push_many(
    frontier: Frontier,
    keys: Float[Array, " K"],
    items: Any,
    *,
    where: Bool[Array, " K"] | None = None,
) -> Frontier:
    """The frontier with more items.

    Args:
      frontier: what waits.
      keys: f32 `[K]`. Items whose key is infinite or not a number do not come in.
      items: a pytree of arrays `[K, ...]`, as given to `empty`.
      where: bool `[K]`, which come in; None: all.

    Returns:
      the new frontier. Where it would hold more than C, those that came first stay, the others are
      left out, and `overflowed` is true from then on.

    Raises:
      ValueError: wrong ranks, lengths or dtypes, or other items than the frontier's.
    """
    _checks.rank("keys", keys, 1)
    _checks.floating(keys=keys)
    number, capacity = jnp.shape(keys)[0], frontier.keys.shape[0]
    own: Any = jax.tree.structure(frontier.items)
    new: Any = jax.tree.structure(items)
    if own != new:
        raise ValueError(f"items: expected a pytree like {own}, got {new}")
    for had, got in zip(jax.tree.leaves(frontier.items), jax.tree.leaves(items), strict=True):
        if jnp.shape(got) != (number, *had.shape[1:]):
            raise ValueError(
                f"items: expected shape {(number, *had.shape[1:])}, got {jnp.shape(got)}"
            )
    comes = jnp.isfinite(keys)
    if where is not None:
        _checks.boolean(where=where)
        _checks.same_shape(keys=keys, where=where)
        comes &= where
    count = comes.sum(dtype=jnp.int32)
    # A loop of at most one turn: unlike a branch, it leaves the arrays where they are in memory.
    frontier, _ = jax.lax.while_loop(
        lambda state: state[1],
        lambda state: (_closed_up(state[0]), jnp.bool_(False)),
        (frontier, frontier.end + count > capacity),
    )
    place = frontier.end + jnp.cumsum(comes, dtype=jnp.int32) - 1
    place = jnp.where(comes, place, capacity)  # out of bounds, which a scatter leaves out
    kept_keys, kept_items = jax.tree.map(
        lambda old, new: old.at[place].set(new, mode="drop"),
        (frontier.keys, frontier.items),
        (widened(keys).astype(frontier.keys.dtype), items),
    )
    end = frontier.end + count
    overflowed = frontier.overflowed | (end > capacity)
    return Frontier(kept_keys, kept_items, jnp.minimum(end, capacity), overflowed)


def pop_many(frontier: Frontier, *, count: int) -> tuple[Popped, Frontier]:
    """The items with the smallest keys, of equal ones those that came first, and what is left.

    Args:
      frontier: what waits.
      count: K in [1, C], static.

    Returns:
      the items in order; fewer than K wait where `valid` is false. The frontier without them.

    Raises:
      ValueError: a `count` out of range.
    """
    _checks.in_range("count", count, 1, frontier.keys.shape[0])
    if count == 1:
        places = _first_least(frontier.keys)[None]
    else:  # of equal keys, top_k too takes the first
        places = jax.lax.top_k(-frontier.keys, count)[1]
    keys = frontier.keys[places]
    popped = Popped(keys, jax.tree.map(lambda x: x[places], frontier.items), jnp.isfinite(keys))
    return popped, frontier._replace(keys=frontier.keys.at[places].set(jnp.inf))


def waiting(frontier: Frontier) -> Int[Array, ""]:
    """How many items wait."""
    return jnp.isfinite(frontier.keys).sum(dtype=jnp.int32)


def _first_least(keys: Float[Array, " C"], block: int = 256) -> Int[Array, ""]:
    """`argmin`, by blocks: a minimum without its index is some fifty times as fast on a CPU."""
    if keys.shape[0] % block:
        keys = jnp.pad(keys, (0, -keys.shape[0] % block), constant_values=jnp.inf)
    rows = keys.reshape(-1, block)
    row = jnp.argmin(rows.min(axis=1))
    return (row * block + jnp.argmin(rows[row])).astype(jnp.int32)


def _closed_up(frontier: Frontier) -> Frontier:
    """The same items without gaps between them."""
    capacity = frontier.keys.shape[0]
    stays = jnp.isfinite(frontier.keys)
    place = jnp.where(stays, jnp.cumsum(stays, dtype=jnp.int32) - 1, capacity)
    keys = jnp.full_like(frontier.keys, jnp.inf).at[place].set(frontier.keys, mode="drop")
    items = jax.tree.map(lambda x: x.at[place].set(x, mode="drop"), frontier.items)
    return frontier._replace(keys=keys, items=items, end=stays.sum(dtype=jnp.int32))
