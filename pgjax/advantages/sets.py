"""Advantages of sets: a score of n samples together, credited to every member alike.

The objective is `F = E f(y_1, ..., y_n)` over n independent samples, and its gradient
`E[(f - E f) Σ_i ∇ log π(y_i)]`: all members of a set share one scalar. From N > n samples many
overlapping sets are formed, given as an index array `sets[M, n]`. Samples of a group being
independent, it does not matter which sets are taken, so one choice may serve every group and step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.advantages import _common

MAX_SETS = 100_000
Diversity = Callable[[Int[Array, "*batch n"]], Float[Array, "*batch"]]


def all_sets(num_members: int, set_size: int) -> Int[np.ndarray, "M n"]:
    """Every subset of n of N members.

    Args:
      num_members: N.
      set_size: n, in [1, N].

    Returns:
      int32 `[C(N, n), n]`, each row ascending.

    Raises:
      ValueError: n outside [1, N], or more than 100,000 subsets.
    """
    _checks.in_range("set_size", set_size, 1, num_members)
    count = math.comb(num_members, set_size)
    if count > MAX_SETS:
        raise ValueError(
            f"num_members, set_size: expected at most {MAX_SETS} subsets, got {count}; "
            "draw some with random_sets"
        )
    return np.array(list(itertools.combinations(range(num_members), set_size)), np.int32)


def random_sets(
    key: PRNGKeyArray, num_members: int, set_size: int, num_sets: int
) -> Int[Array, "M n"]:
    """M sets of n different members out of N; sets may overlap and repeat.

    Args:
      key: randomness.
      num_members: N.
      set_size: n, in [1, N].
      num_sets: M.

    Returns:
      int32 `[M, n]`.

    Raises:
      ValueError: n outside [1, N], or M below 1.
    """
    _checks.in_range("set_size", set_size, 1, num_members)
    _checks.in_range("num_sets", num_sets, 1)

    def one(key: Array) -> Array:
        return jax.random.permutation(key, num_members)[:set_size].astype(jnp.int32)

    return jax.vmap(one)(jax.random.split(key, num_sets))


def duplicate_labels(
    tokens: Int[Array, "*batch N T"], mask: Bool[Array, "*batch N T"]
) -> Int[Array, "*batch N"]:
    """Labels that are equal where rows hold the same tokens: the index of the first equal row.

    Exact, without hashing. Rows are equal if their masks are, and their tokens on them.

    Args:
      tokens: N rows to be compared with each other.
      mask: tokens that count.

    Returns:
      int32 `[..., N]`, in [0, N).

    Raises:
      ValueError: wrong dtypes or unequal shapes.
    """
    _checks.integer(tokens=tokens)
    _checks.boolean(mask=mask)
    _checks.same_shape(tokens=tokens, mask=mask)

    def row(row_tokens: Array, row_mask: Array) -> Array:
        same = jnp.where(row_mask[..., None, :], row_tokens[..., None, :] == tokens, True)
        return jnp.argmax(
            jnp.all(same & (row_mask[..., None, :] == mask), axis=-1), axis=-1
        ).astype(jnp.int32)

    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    rows = jax.lax.map(lambda r: row(*r), (jnp.moveaxis(tokens, -2, 0), jnp.moveaxis(mask, -2, 0)))
    return jnp.moveaxis(rows, 0, -1)


def unique_fraction(signatures: Int[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """Number of different values over n, the diversity of a set.

    Args:
      signatures: integers of each member; equal ones count once.

    Returns:
      f32 `[*batch]` in [1/n, 1].

    Raises:
      ValueError: a dtype that is no integer's, or n = 0.

    Source: polychromic objectives, 2025, arXiv 2509.25424.
    """
    _checks.integer(signatures=signatures)
    if np.ndim(signatures) < 1 or np.shape(signatures)[-1] < 1:
        raise ValueError(f"signatures: expected [..., n], got shape {np.shape(signatures)}")
    x = jnp.asarray(signatures)
    n = x.shape[-1]
    same = x[..., :, None] == x[..., None, :]
    earlier = jnp.tril(jnp.ones((n, n), bool), -1)
    return jnp.mean(~jnp.any(same & earlier, axis=-1), axis=-1, dtype=jnp.float32)


def polychromic(
    returns: Float[Array, "*batch n"],
    signatures: Int[Array, "*batch n"],
    *,
    diversity: Diversity = unique_fraction,
) -> Float[Array, "*batch"]:
    """Mean return of a set times its diversity, `f = (1/n Σ_i R_i) d(y_1, ..., y_n)`.

    Args:
      returns: of the members, in [0, 1]: with negative ones diversity would be punished. Returns
        that cannot be seen are checked under `jax.experimental.checkify` only.
      signatures: of the members; what is equal counts as the same sample.
      diversity: `signatures[..., n] -> [...]` in [0, 1].

    Returns:
      f32 `[...]` in [0, 1]; 0 if no member succeeds.

    Raises:
      ValueError: wrong dtypes, unequal shapes, concrete returns outside [0, 1].

    Source: polychromic objectives, 2025, arXiv 2509.25424.
    """
    _checks.floating(returns=returns)
    _checks.same_shape(returns=returns, signatures=signatures)
    check_unit_interval("returns", returns)
    mean = jnp.mean(jnp.asarray(returns, jnp.promote_types(returns.dtype, jnp.float32)), axis=-1)
    return mean * diversity(signatures)


def set_scores(
    score: Callable[..., Float[Array, ...]],
    sets: Int[Array, "M n"],
    *members: Array,
) -> Float[Array, "*batch M"]:
    """The score of every set, `score(members[..., sets])`.

    Args:
      score: `(x[..., M, n], ...) -> [..., M]`, such as `polychromic`.
      sets: indices of members.
      *members: arrays `[..., N]`, one value a member: returns, signatures.

    Raises:
      ValueError: sets of wrong rank or dtype; concrete ones that are empty, repeat a member or
        name one that does not exist.
    """
    for x in members:
        _check_sets(sets, np.shape(x)[-1])
    return score(*(jnp.asarray(x)[..., jnp.asarray(sets)] for x in members))


def set_advantage(
    scores: Float[Array, "*batch M"],
    sets: Int[Array, "M n"],
    *,
    num_members: int,
    where: Bool[Array, "*batch M"] | None = None,
) -> Float[Array, "*batch N"]:
    """Each member's mean over the sets it is in of `f(set) - mean f`.

    The mean runs over all sets, those of the member included. With sets of a fixed choice and
    independent samples, the expectation of `A_i ∇ log π(y_i)` is `(1 - k_i / M) / n` times the
    gradient of `E f`, for a member of k_i > 0 of the M sets; over all subsets `k_i / M = n / N`.

    Args:
      scores: of the sets, see `set_scores`.
      sets: indices of their members.
      num_members: N, static.
      where: sets that count; None for all.

    Returns:
      f32 `[..., N]`; 0 for members of no set that counts. Over all subsets they sum to 0.

    Raises:
      ValueError: as `set_scores`; shapes that do not fit.

    Source: as `polychromic`.
    """
    _check_sets(sets, num_members)
    _checks.floating(scores=scores)
    if np.shape(scores)[-1:] != np.shape(sets)[:1]:
        raise ValueError(
            f"scores: expected [..., {np.shape(sets)[0]}], one for each set, "
            f"got shape {np.shape(scores)}"
        )
    x, _, counted = _common.finite_part(scores, where)
    weight = counted.astype(x.dtype)
    # Above the smallest: exactly 0 where all scores are equal, which rounding of a mean is not.
    x = jnp.where(counted, x - jnp.min(x, -1, keepdims=True, where=counted, initial=jnp.inf), 0.0)
    mean = _over(jnp.sum(x, -1, keepdims=True), jnp.sum(weight, -1, keepdims=True))
    deviation = jnp.where(counted, x - mean, 0.0)
    member = jax.nn.one_hot(jnp.asarray(sets), num_members, dtype=x.dtype).sum(-2)  # [M, N]
    exact = jax.lax.Precision.HIGHEST
    total = jnp.matmul(deviation, member, precision=exact)
    return _over(total, jnp.matmul(weight, member, precision=exact))


def grouped_set_advantage(
    score: Callable[..., Float[Array, ...]],
    sets: Int[Array, "M n"],
    group_ids: Int[Array, " B"],
    valid: Bool[Array, " B"],
    *members: Array,
    group_size: int,
) -> Float[Array, " B"]:
    """`set_advantage` within every group of flat rows.

    Args:
      score, sets: as in `set_scores`.
      group_ids: any integers, in any order, each on `group_size` rows.
      valid: rows whose value is known; sets with others do not count.
      *members: arrays `[B]`, one value a row.
      group_size: N, static.

    Returns:
      f32 `[B]`; 0 for rows that are not valid. NaN for rows of a group of another size where ids
      cannot be seen (an error under `jax.experimental.checkify`).

    Raises:
      ValueError: groups that are not all of `group_size` rows; as `set_scores`.
    """
    _checks.boolean(valid=valid)
    _checks.same_shape(group_ids=group_ids, valid=valid)
    order, whole = group_order(group_ids, group_size=group_size)
    blocks = [jnp.asarray(x)[order] for x in members]
    present = jnp.asarray(valid)[order]
    where = jnp.all(present[:, jnp.asarray(sets)], axis=-1)
    scores = set_scores(score, sets, *blocks)
    found = set_advantage(scores, sets, num_members=group_size, where=where)
    found = jnp.where(whole, jnp.where(present, found, 0.0), jnp.nan)
    return jnp.zeros(order.size, found.dtype).at[order.reshape(-1)].set(found.reshape(-1))


def group_order(
    group_ids: Int[Array, " B"], *, group_size: int
) -> tuple[Int[Array, "P N"], Bool[Array, "P 1"]]:
    """Rows of each group side by side: their indices, and whether a line is one whole group.

    Raises:
      ValueError: wrong rank or dtype, a number of rows that groups of this size cannot have, or
        concrete ids that are not on `group_size` rows each.
    """
    _checks.rank("group_ids", group_ids, 1)
    _checks.integer(group_ids=group_ids)
    _checks.in_range("group_size", group_size, 1)
    batch = np.shape(group_ids)[0]
    if batch % group_size:
        raise ValueError(
            f"group_ids: {batch} rows cannot be groups of group_size={group_size} rows each"
        )
    ids = jnp.asarray(group_ids)
    order = jnp.argsort(ids, stable=True).reshape(-1, group_size)
    first = ids[order][:, :1]
    size = jnp.sum(ids == first, axis=-1, keepdims=True)
    whole = size == group_size
    if _checks.is_concrete(group_ids) and getattr(group_ids, "is_fully_addressable", True):
        if not np.all(np.asarray(whole)):
            raise ValueError(
                f"group_ids: expected every id on {group_size} rows, "
                f"got one on {int(np.asarray(size)[~np.asarray(whole)][0])}"
            )
    else:
        _checks.traced(jnp.all(whole), f"group_ids: expected every id on {group_size} rows")
    return order, whole


def in_first_steps(
    set_advantages: Float[Array, ...], others: Float[Array, "T ..."], *, window: int
) -> Float[Array, "T ..."]:
    """The set's advantage in the first W steps after its start, other advantages behind them.

    Args:
      set_advantages: one per vine.
      others: of every step, such as generalised advantage estimates; time first.
      window: W ≥ 0, static.

    Raises:
      ValueError: shapes that do not fit, `window` below 0.

    Source: Poly-PPO, as `polychromic`.
    """
    _checks.in_range("window", window, 0)
    _checks.floating(set_advantages=set_advantages, others=others)
    if np.shape(others)[1:] != np.shape(set_advantages):
        raise ValueError(
            f"others: expected shape (T, *{np.shape(set_advantages)}), got {np.shape(others)}"
        )
    step = jnp.arange(others.shape[0]).reshape(-1, *(1,) * (others.ndim - 1))
    return jnp.where(step < window, set_advantages, others)


def check_unit_interval(name: str, values: Any) -> None:
    """Raises ValueError on concrete numbers outside [0, 1]; NaN passes."""
    if _checks.is_concrete(values) and getattr(values, "is_fully_addressable", True):
        x = np.asarray(values)
        if np.any(x < 0) or np.any(x > 1):
            raise ValueError(
                f"{name}: expected numbers in [0, 1], got values in "
                f"[{np.nanmin(x)}, {np.nanmax(x)}]; normalise them first"
            )
        return
    inside = ~jnp.any((values < 0) | (values > 1))
    _checks.traced(inside, f"{name}: expected numbers in [0, 1]")


def _over(total: Array, count: Array) -> Array:
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def _check_sets(sets: Any, num_members: int) -> None:
    _checks.rank("sets", sets, 2)
    _checks.integer(sets=sets)
    if 0 in np.shape(sets):
        raise ValueError(f"sets: expected at least one set and one member, got {np.shape(sets)}")
    if np.shape(sets)[1] > num_members:
        raise ValueError(
            f"sets: expected at most {num_members} members, got sets of {np.shape(sets)[1]}"
        )
    if _checks.is_concrete(sets):
        x = np.sort(np.asarray(sets), axis=1)
        if x.min() < 0 or x.max() >= num_members:
            raise ValueError(
                f"sets: expected members in [0, {num_members}), got values in "
                f"[{x.min()}, {x.max()}]"
            )
        if np.any(x[:, 1:] == x[:, :-1]):
            raise ValueError("sets: expected different members in every set, got one twice")
