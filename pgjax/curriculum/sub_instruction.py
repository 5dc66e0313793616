"""Easier versions of a task of several parts: some done before, only some asked for, or made up.

Schedules take the share of the training that is over, traced or not; masks are drawn at the
beginning of an episode.

Source: QWeb, Gur et al. 2018, "Learning to Navigate the Web", arXiv 1812.09195. Which schedules its
authors took is not known; these are linear.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks


def warm_start_chance(share: float | Float[Array, ""], *, until: float = 0.6) -> Float[Array, ""]:
    """The chance p of a part to be done before: from 1 down to 0, linearly, and 0 from `until` on.

    Args:
      share: of the training that is over, in [0, 1].
      until: in (0, 1].

    Raises:
      ValueError: a concrete number out of range.
    """
    _checks.in_range("share", share, 0.0, 1.0)
    _checks.in_range("until", until, 0.0, 1.0, low_open=True)
    return jnp.clip(1.0 - jnp.asarray(share, jnp.float32) / until, 0.0, 1.0)


def warm_start_mask(
    key: PRNGKeyArray, num_parts: int, *, chance: float | Float[Array, ""]
) -> Bool[Array, " K"]:
    """True for parts that are done before the episode begins, each with probability p.

    Args:
      key: of the draw.
      num_parts: K ≥ 1.
      chance: p in [0, 1].

    Raises:
      ValueError: a number out of range.
    """
    _checks.in_range("num_parts", num_parts, 1)
    _checks.in_range("chance", chance, 0.0, 1.0)
    return jax.random.uniform(key, (num_parts,)) < chance


def subgoal_size(
    share: float | Float[Array, ""], *, num_parts: int, until: float = 0.6
) -> Int[Array, ""]:
    """How many parts are asked for: from 1 up to K in equal stages, and K from `until` on.

    Args:
      share: of the training that is over, in [0, 1].
      num_parts: K ≥ 1.
      until: in (0, 1].

    Returns:
      int32.

    Raises:
      ValueError: a concrete number out of range.
    """
    _checks.in_range("share", share, 0.0, 1.0)
    _checks.in_range("num_parts", num_parts, 1)
    _checks.in_range("until", until, 0.0, 1.0, low_open=True)
    over = jnp.asarray(share, jnp.float32) / until
    stage = 1 + jnp.floor(over * (num_parts - 1) + 1e-6).astype(jnp.int32)
    return jnp.minimum(stage, num_parts)


def subgoal_mask(
    key: PRNGKeyArray, num_parts: int, *, size: int | Int[Array, ""]
) -> Bool[Array, " K"]:
    """True for the parts that are asked for, a uniformly random subset of this size.

    Args:
      key: of the draw.
      num_parts: K ≥ 1.
      size: k in [1, K]; it may be traced.

    Raises:
      ValueError: a concrete number out of range.
    """
    _checks.in_range("num_parts", num_parts, 1)
    _checks.in_range("size", size, 1, num_parts)
    return jax.random.permutation(key, num_parts) < size


class Walk(NamedTuple):
    """What a random walk over a form left in it.

    Attributes:
      place: elements in the order of their visits, int32 `[W]`.
      value: what was written, int32 `[W]`.
      stays: not written over by a later visit, bool `[W]`: a task is made of these.
    """

    place: Int[Array, " W"]
    value: Int[Array, " W"]
    stays: Bool[Array, " W"]


def random_walk_goal(
    key: PRNGKeyArray, writable: Bool[Array, " L"], *, num_visits: int, num_values: int
) -> Walk:
    """A goal that can be reached, without anybody to give one: random values in random elements.

    Args:
      key: of the walk.
      writable: elements that take a value, `[L]`.
      num_visits: W ≥ 1, uniformly over those elements, with repetitions.
      num_values: values are 1 to this, uniformly.

    Returns:
      the walk. Where a traced page has nothing to write in, nothing stays.

    Raises:
      ValueError: a number out of range, no elements, a concrete page without writable ones: its
        goal cannot be reached.
    """
    _checks.in_range("num_visits", num_visits, 1)
    _checks.in_range("num_values", num_values, 1)
    _checks.rank("writable", writable, 1)
    _checks.boolean(writable=writable)
    if not np.size(writable) or (_checks.is_concrete(writable) and not np.any(writable)):
        raise ValueError("writable: expected an element that takes a value, got none")
    place_key, value_key = jax.random.split(key)
    logits = jnp.where(writable, 0.0, -jnp.inf)
    place = jax.random.categorical(place_key, logits, shape=(num_visits,)).astype(jnp.int32)
    value = jax.random.randint(value_key, (num_visits,), 1, num_values + 1, jnp.int32)
    order = jnp.arange(num_visits)
    later = (place[:, None] == place[None]) & (order[None] > order[:, None])
    return Walk(place, value, ~later.any(axis=1) & jnp.any(writable))
