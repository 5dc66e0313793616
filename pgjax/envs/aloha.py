"""Islands that share the air: whoever sends while a neighbour sends loses the message.

Ten islands, two rows of five, each with messages waiting. A message that meets no other is through
and pays .1; each one that does costs 10 and waits on. All share the sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Box, Environment, Step, with_time_limit


def two_rows(columns: int = 5) -> Bool[np.ndarray, "n n"]:
    """Neighbours on a grid of two rows, numbered row by row."""
    _checks.in_range("columns", columns, 1)
    cells = np.stack(np.divmod(np.arange(2 * columns), columns), axis=-1)
    return np.abs(cells[:, None] - cells[None]).sum(-1) == 1


def aloha(
    neighbours: Bool[np.ndarray, "n n"] | None = None,
    *,
    arrival: float = 0.6,
    capacity: int = 5,
    max_steps: int = 20,
) -> Environment:
    """The islands; never terminates.

    State: messages waiting, int32 `[n]`, 1 each at first; observation: the same, f32 `[n]`, of
    which each island knows its own entry; action: integers `[n]`, 1 to send, of which the kind says
    `Box((n,), 0, 1)`. Who has nothing sends nothing. Then with some chance a message arrives at
    each island that has room.

    Args:
      neighbours: who disturbs whom, symmetric bool `[n, n]`, false on the diagonal; None:
        `two_rows()`.
      arrival: chance in [0, 1].
      capacity: messages that can wait, ≥ 1.
      max_steps: after which an episode is truncated.

    Raises:
      ValueError: neighbours of another shape, not symmetric, or their own; a number out of range.

    Source: Aloha of the MACO benchmark, Wang et al. 2021, arXiv 2106.02886, as in BN-MAPPO, Chen
    and Zhang 2023, arXiv 2306.01920. The graph and what an empty island may do are not given there
    and are those of the benchmark's description.
    """
    given = two_rows() if neighbours is None else np.asarray(neighbours)
    _checks.boolean(neighbours=given)
    if given.ndim != 2 or (given != given.T).any() or given.diagonal().any():
        raise ValueError(
            "neighbours: expected a symmetric matrix [n, n], false on the diagonal, got shape "
            f"{given.shape}"
        )
    _checks.in_range("arrival", arrival, 0.0, 1.0)
    _checks.in_range("capacity", capacity, 1)
    size, near = len(given), jnp.asarray(given)

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        del key
        return jnp.ones(size, jnp.int32), jnp.ones(size)

    def step(key: PRNGKeyArray, waiting: Int[Array, " n"], action: Int[Array, " n"]) -> Step:
        sends = (action == 1) & (waiting > 0)
        disturbed = sends & jnp.any(near & sends, axis=1)
        through = sends & ~disturbed
        reward = 0.1 * through.sum() - 10.0 * disturbed.sum()
        arrives = jax.random.bernoulli(key, arrival, (size,))
        waiting = jnp.minimum(waiting - through + arrives, capacity).astype(jnp.int32)
        seen = waiting.astype(jnp.float32)
        return Step(waiting, seen, reward, jnp.bool_(False), jnp.bool_(False))

    env = Environment(reset, step, Box((size,), 0, capacity), Box((size,), 0, 1), "Aloha")
    return with_time_limit(env, max_steps)
