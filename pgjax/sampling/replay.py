"""A replay buffer: a ring of transitions in one pytree, sampled uniformly.

```
buffer = replay.init(example, capacity=10_000)   # one transition, no batch axis
buffer = replay.add(buffer, batch)               # leaves [B, ...]
batch = replay.sample(buffer, key, batch_size=256)
```

Inside a scanned program XLA writes into the ring in place. Where `add` is a program by itself,
donate the buffer (`jax.jit(replay.add, donate_argnums=0)`), or each call copies the whole ring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from pgjax import _checks


class Replay(NamedTuple):
    """What was met lately.

    Attributes:
      items: a pytree of arrays `[capacity, ...]`.
      position: row the next one goes to, int32.
      filled: rows that hold something, int32.
    """

    items: Any
    position: Int[Array, ""]
    filled: Int[Array, ""]


def init(example: Any, *, capacity: int) -> Replay:
    """An empty ring for things like the example.

    Args:
      example: a pytree of arrays, or of `jax.ShapeDtypeStruct`, without a batch axis.
      capacity: rows, ≥ 1.

    Raises:
      ValueError: a `capacity` below 1, an example without arrays.
    """
    _checks.in_range("capacity", capacity, 1)
    if not jax.tree.leaves(example):
        raise ValueError(f"example: expected a pytree with arrays, got {example!r}")
    items = jax.tree.map(
        lambda x: jnp.zeros((capacity, *np.shape(x)), _dtype(x)),
        example,
    )
    return Replay(items, jnp.int32(0), jnp.int32(0))


def add(buffer: Replay, batch: Any) -> Replay:
    """The ring with a batch in it, in place of what is oldest where it is full.

    Args:
      buffer: the ring.
      batch: leaves `[B, ...]`, 1 ≤ B ≤ capacity; the structure of the example.

    Raises:
      ValueError: a batch of another structure or shape, larger than the ring, or empty.
    """
    capacity = _rows("buffer", buffer.items)
    wanted: Any = jax.tree.structure(buffer.items)
    if wanted != jax.tree.structure(batch):
        raise ValueError(f"batch: expected the structure {wanted}, got {jax.tree.structure(batch)}")
    size = _rows("batch", batch)
    if not 1 <= size <= capacity:
        raise ValueError(f"batch: expected 1 to {capacity} rows (the capacity), got {size}")
    for ring, new in zip(jax.tree.leaves(buffer.items), jax.tree.leaves(batch), strict=True):
        if np.shape(new) != (size, *ring.shape[1:]):
            raise ValueError(f"batch: expected rows of shape {ring.shape[1:]}, got {np.shape(new)}")
    rows = (buffer.position + jnp.arange(size)) % capacity
    items = jax.tree.map(
        lambda ring, new: ring.at[rows].set(new, unique_indices=True), buffer.items, batch
    )
    return Replay(
        items,
        (buffer.position + size) % capacity,
        jnp.minimum(buffer.filled + size, capacity),
    )


def sample(buffer: Replay, key: PRNGKeyArray, *, batch_size: int) -> Any:
    """Rows of the ring, uniformly and with replacement.

    Args:
      buffer: a ring that holds something; of an empty one the rows are zeros.
      key: of the choice.
      batch_size: B ≥ 1.

    Returns:
      the items, leaves `[B, ...]`.

    Raises:
      ValueError: a `batch_size` below 1.
    """
    _checks.in_range("batch_size", batch_size, 1)
    rows = jax.random.randint(key, (batch_size,), 0, jnp.maximum(buffer.filled, 1))
    return jax.tree.map(lambda x: x[rows], buffer.items)


def sample_sequences(
    buffer: Replay,
    key: PRNGKeyArray,
    *,
    batch_size: int,
    length: int,
    ended: Callable[[Any], Bool[Array, " C"]],
    stride: int = 1,
) -> tuple[Any, Bool[Array, " B"]]:
    """Rows that followed each other, uniformly over all places where so many of one episode do.

    Args:
      buffer: a ring whose rows were added in the order of time; of N environments by turns, with a
        capacity that N divides.
      key: of the choice.
      batch_size: B ≥ 1.
      length: K ≥ 1 rows of each sequence.
      ended: `items -> bool [capacity]`: the episode was over after this row. It may be for the
        last row of a sequence, not for one before.
      stride: N, rows from one step of an environment to its next.

    Returns:
      the items, leaves `[B, K, ...]`; whether these are sequences, bool `[B]`: all false where the
      ring holds none, and then the rows mean nothing.

    Raises:
      ValueError: a number below 1, a capacity that N does not divide or that K steps do not fit.
    """
    for name, count in {"batch_size": batch_size, "length": length, "stride": stride}.items():
        _checks.in_range(name, count, 1)
    capacity = _rows("buffer", buffer.items)
    if capacity % stride or capacity < length * stride:
        raise ValueError(
            f"stride: expected a divisor of the capacity, {capacity}, that {length} times is no "
            f"more than it, got {stride}"
        )
    rows = jnp.arange(capacity)
    age = (rows - buffer.position) % capacity  # 0: the oldest, once full
    age = jnp.where(buffer.filled < capacity, rows, age)
    last = (length - 1) * stride
    valid = age + last < buffer.filled
    over = ended(buffer.items)
    for k in range(length - 1):
        valid &= ~jnp.roll(over, -k * stride)
    number = jnp.cumsum(valid)
    drawn = jax.random.randint(key, (batch_size,), 0, jnp.maximum(number[-1], 1))
    first = jnp.searchsorted(number, drawn + 1)
    chosen = (first[:, None] + stride * jnp.arange(length)) % capacity
    found = jax.tree.map(lambda x: x[chosen], buffer.items)
    return found, jnp.broadcast_to(number[-1] > 0, (batch_size,))


def _rows(name: str, items: Any) -> int:
    shape = np.shape(jax.tree.leaves(items)[0])
    if not shape:
        raise ValueError(f"{name}: expected leaves [B, ...], got a scalar")
    return shape[0]


def _dtype(x: Any) -> Any:
    return x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jnp.result_type(x)
