"""Value iteration on a grid of states and actions, of which few entries are sampled.

Source: Sample Efficient Reinforcement Learning via Low-Rank Matrix Estimation, Shah, Song, Xu and
Yang 2020, arXiv 2006.06135.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.values.low_rank import Completion, anchor_complete

Sample = Callable[[PRNGKeyArray, Array, Array], tuple[Float[Array, ""], Array]]
Nearest = Callable[[Array], Int[Array, ""]]


def sampled_backup(
    key: PRNGKeyArray,
    values: Float[Array, " m"],
    states: Array,
    actions: Array,
    *,
    sample: Sample,
    nearest: Nearest,
    num_samples: int,
    discount: float,
) -> Float[Array, "a b"]:
    """`(1/N) Σ_i (r_i + γ V(nearest(s'_i)))` for each state with each action.

    Args:
      key: of the draws, which are independent.
      values: V of the grid's states, f32 `[m]`.
      states: `[a, ...]`.
      actions: `[b, ...]`.
      sample: the generative model, `(key, state, action) -> (reward, next state)`.
      nearest: `state -> index in [0, m)` of the grid's state that stands for it.
      num_samples: N ≥ 1, static.
      discount: γ in [0, 1).

    Returns:
      f32 `[a, b]`.

    Raises:
      ValueError: no states or actions, a number out of range, and outside of transformations a
        result that is not finite; within them that is an error under `jax.experimental.checkify`.
    """
    _checks.rank("values", values, 1)
    _checks.in_range("num_samples", num_samples, 1)
    _checks.in_range("discount", discount, 0.0, 1.0, high_open=True)
    shape = _count("states", states), _count("actions", actions)

    def entry(key: PRNGKeyArray, state: Array, action: Array) -> Array:
        keys = jax.random.split(key, num_samples)
        reward, following = jax.vmap(lambda k: sample(k, state, action))(keys)
        return jnp.mean(reward + discount * values[jax.vmap(nearest)(following)])

    each = jax.vmap(jax.vmap(entry, (0, None, 0)), (0, 0, None))
    found = each(jax.random.split(key, shape), jnp.asarray(states), jnp.asarray(actions))
    return _finite(found)


def low_rank_backup(
    key: PRNGKeyArray,
    values: Float[Array, " m"],
    states: Array,
    actions: Array,
    *,
    sample: Sample,
    nearest: Nearest,
    num_samples: int,
    discount: float,
    action_anchors: Int[Array, " k"],
    select_states: Callable[[PRNGKeyArray, Float[Array, "m k"]], Int[Array, " l"]],
    rank: int | None = None,
    rcond: float = 1e-6,
) -> Completion:
    """One iteration: the anchors' columns and rows by `sampled_backup`, the rest by completion.

    Each entry is drawn once, also where a row and a column meet.

    Args:
      key: of draws and anchors.
      states, actions: of the whole grid, `[m, ...]` and `[n, ...]`.
      action_anchors: A#, int32 `[k]`, none twice.
      select_states: `(key, columns) -> S#`, int32 `[l]`, none twice: `pivoted_anchors` of the
        columns just sampled, or any that do not depend on them.
      rank, rcond: of `anchor_complete`; a rank is wanted wherever there are more anchors than that.
      values, sample, nearest, num_samples, discount: of `sampled_backup`.

    Returns:
      the action values of the grid, `[m, n]`, and the condition of the block.

    Raises:
      ValueError: anchors that are out of range or there twice (where concrete), or no vector of
        integers; and what the parts raise.
    """
    m, n = _count("states", states), _count("actions", actions)
    states, actions = jnp.asarray(states), jnp.asarray(actions)
    _check_anchors("action_anchors", action_anchors, n)
    options: dict[str, Any] = {
        "sample": sample,
        "nearest": nearest,
        "num_samples": num_samples,
        "discount": discount,
    }
    column_key, select_key, row_key = jax.random.split(key, 3)
    columns = sampled_backup(column_key, values, states, actions[action_anchors], **options)
    state_anchors = select_states(select_key, columns)
    _check_anchors("select_states", state_anchors, m)
    block = columns[state_anchors]
    rows = jnp.zeros((block.shape[0], n), block.dtype).at[:, action_anchors].set(block)
    if block.shape[1] < n:
        free = jnp.ones(n, bool).at[action_anchors].set(False)
        others = jnp.nonzero(free, size=n - block.shape[1])[0]
        drawn = sampled_backup(row_key, values, states[state_anchors], actions[others], **options)
        rows = rows.at[:, others].set(drawn)
    return anchor_complete(columns, block, rows, rank=rank, rcond=rcond)


class LowRankRun(NamedTuple):
    """Of `low_rank_value_iteration`.

    Attributes:
      action_values: f32 `[m, n]`, of the last iteration, not clipped.
      values: f32 `[m]`, their largest over actions, clipped.
      conditions: of the block, f32 `[T]`.
      changes: largest change of a value in each iteration, f32 `[T]`.
    """

    action_values: Float[Array, "m n"]
    values: Float[Array, " m"]
    conditions: Float[Array, " T"]
    changes: Float[Array, " T"]


def low_rank_value_iteration(
    key: PRNGKeyArray,
    states: Array,
    actions: Array,
    *,
    num_iterations: int,
    value_range: tuple[float, float],
    sample: Sample,
    nearest: Nearest,
    num_samples: int,
    discount: float,
    action_anchors: Int[Array, " k"],
    select_states: Callable[[PRNGKeyArray, Float[Array, "m k"]], Int[Array, " l"]],
    rank: int | None = None,
    rcond: float = 1e-6,
) -> LowRankRun:
    """`low_rank_backup` again and again: V_t(s) = max_a Q_t(s, a), from V_0 = 0.

    An iteration multiplies the error of the values by at most γ c, where c is how far completion
    multiplies an error of the entries (it grows with the condition of the block), so that it is
    sure to converge only for a discount below 1/c; the clip of the values keeps it finite always.

    Args:
      key: of draws and anchors.
      states, actions: of the grid, `[m, ...]` and `[n, ...]`.
      num_iterations: T ≥ 1, static.
      value_range: lowest and highest value there can be, usually those of the reward over 1 - γ.
      sample, nearest, num_samples, discount, action_anchors, select_states, rank, rcond: of
        `low_rank_backup`.

    Returns:
      a `LowRankRun`; it took T N draws of each of the `observed_entries`.

    Raises:
      ValueError: a `num_iterations` below 1, an empty range, and what `low_rank_backup` raises.

    Source: Shah et al. 2020, arXiv 2006.06135. The paper refines grid and number of draws from
    iteration to iteration; here they stay. Clipped values and truncated rank are additions.
    """
    _checks.in_range("num_iterations", num_iterations, 1)
    low, high = value_range
    if not low <= high:
        raise ValueError(f"value_range: expected lowest and highest value, got {value_range}")

    def step(state: tuple[Array, Array], key: PRNGKeyArray) -> Any:
        _, values = state
        found = low_rank_backup(
            key,
            values,
            states,
            actions,
            sample=sample,
            nearest=nearest,
            num_samples=num_samples,
            discount=discount,
            action_anchors=action_anchors,
            select_states=select_states,
            rank=rank,
            rcond=rcond,
        )
        found = jax.tree.map(lambda x: x.astype(values.dtype), found)
        new = jnp.clip(found.matrix.max(axis=1), low, high)
        return (found.matrix, new), (found.condition, jnp.abs(new - values).max())

    m, n = _count("states", states), _count("actions", actions)
    start = jnp.zeros((m, n)), jnp.zeros(m)
    (matrix, values), history = jax.lax.scan(step, start, jax.random.split(key, num_iterations))
    return LowRankRun(_finite(matrix), values, *history)


def _count(name: str, points: Array) -> int:
    shape = jnp.shape(points)
    if not shape or shape[0] < 1:
        raise ValueError(f"{name}: expected at least one, on the first axis, got shape {shape}")
    return shape[0]


def _check_anchors(name: str, anchors: Array, num: int) -> None:
    _checks.rank(name, anchors, 1)
    _checks.segment_ids(name, anchors, num)
    count = jnp.shape(anchors)[0]
    if not 1 <= count <= num:
        raise ValueError(f"{name}: expected 1 to {num} anchors, got {count}")
    if _checks.is_concrete(anchors) and len(np.unique(np.asarray(anchors))) < count:
        raise ValueError(f"{name}: expected no anchor twice, got {np.asarray(anchors).tolist()}")


def _finite(values: Array) -> Array:
    message = "sample: expected finite rewards"
    if _checks.is_concrete(values) and not bool(jnp.isfinite(values).all()):
        raise ValueError(f"{message}, got values that are not")
    _checks.traced(jnp.isfinite(values).all(), message)
    return values
