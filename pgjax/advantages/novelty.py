"""How much a sample's features differ from its group's, and rewards shaped by that."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments

ROWS_AT_ONCE = 256  # similarities of so many rows to all others are in memory at a time


def feature_novelty(
    features: Float[Array, "B D"],
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """One minus the reward-weighted squared cosine between a sample's features and its peers'.

        ν_i = max(1 - Σ_{j≠i} w_ij cos(Φ_i, Φ_j)², 0),   w_ij = softmax over peers j of R_j

    With `score_features` of the policy as Φ, the directions in which samples would push the
    network's last hidden states; any other features will do. Opposite directions count as equal.

    Args:
      features: real, one vector a sample; only their directions matter.
      rewards: one per sample, -1 and 1 in the paper; not finite where the verifier failed.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: static.
      where: rows that count as peers, such as the first row of each trajectory; None for all.

    Returns:
      f32 `[B]` in [0, 1]; 1 for a sample without peers and for features that are all 0.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; features of width 0; concrete ids out of
        range.

    Source: G2RL, 2025, arXiv 2512.15687. The ε in the paper's denominators is 0 here: what they
    guard against has results of its own.
    """
    _checks.rank("features", features, 2)
    _checks.rank("rewards", rewards, 1)
    _checks.floating(features=features, rewards=rewards)
    _checks.same_shape(rewards=rewards, group_ids=group_ids, where=where)
    size, width = np.shape(features)
    if width < 1 or size != np.shape(rewards)[0]:
        raise ValueError(
            f"features: expected {np.shape(rewards)[0]} rows like rewards, of at least 1 number, "
            f"got shape {np.shape(features)}"
        )
    peers = jnp.isfinite(rewards) if where is None else jnp.isfinite(rewards) & where
    unit = _directions(features)
    options: dict[str, Any] = {"num_segments": num_groups, "where": peers}
    highest = segments.per_row(segments.maximum(rewards, group_ids, **options), group_ids)
    ids = jnp.asarray(group_ids)

    def redundancy(i: Array) -> Array:
        peer = peers & (ids == ids[i]) & (jnp.arange(size) != i)
        # Measured from the peers' own highest reward, so that some exponential is 1.
        top = jnp.max(jnp.where(peer, rewards, -jnp.inf), initial=-jnp.inf)
        top = jnp.where(jnp.isfinite(top), top, 0.0)
        weight = jnp.where(peer, jnp.exp(jnp.where(peer, rewards, top) - top), 0.0)
        return jnp.sum(weight * (unit @ unit[i]) ** 2) / jnp.maximum(jnp.sum(weight), 1.0)

    shared = jax.lax.map(redundancy, jnp.arange(size), batch_size=ROWS_AT_ONCE)
    # `highest` is NaN for traced ids out of range, and finite otherwise: it keeps them visible.
    return jnp.clip(1.0 - shared, 0.0, 1.0) + 0.0 * highest


def relative_novelty(
    novelty: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    without_spread: float = 0.0,
    tolerance: float = 1e-6,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Novelty stretched over [0, 1] within the group: `(ν_i - min_g ν) / (max_g ν - min_g ν)`.

    Args:
      novelty: one per sample.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: static.
      without_spread: result in groups whose novelties agree, in [0, 1]. What leaves rewards alone:
        0 for `printed_novelty_reward` and `scaled_novelty_reward`, 1/2 for `signed_novelty_reward`.
      tolerance: a spread of at most this much is rounding and counts as none, ≥ 0.
      where: rows that count in minimum and maximum; None for all.

    Returns:
      f32 `[B]` in [0, 1].

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids or numbers out of range.

    Source: G2RL, 2025, arXiv 2512.15687.
    """
    _checks.rank("novelty", novelty, 1)
    _checks.floating(novelty=novelty)
    _checks.same_shape(novelty=novelty, group_ids=group_ids)
    _checks.in_range("without_spread", without_spread, 0.0, 1.0)
    _checks.in_range("tolerance", tolerance, 0.0)
    options: dict[str, Any] = {"num_segments": num_groups, "where": where}
    least = segments.per_row(segments.minimum(novelty, group_ids, **options), group_ids)
    most = segments.per_row(segments.maximum(novelty, group_ids, **options), group_ids)
    spread = most - least
    some = ~(spread <= tolerance)  # so that NaN stays visible
    stretched = (novelty - least) / jnp.where(some, spread, 1.0)
    return jnp.where(some, jnp.clip(stretched, 0.0, 1.0), without_spread)


def printed_novelty_reward(
    rewards: Float[Array, " B"],
    novelty: Float[Array, " B"],
    *,
    strength: float,
    bound: float = 3.0,
) -> Float[Array, " B"]:
    """The paper's formula as printed, `clip(R (1 + λ R ν), -c, c)`.

    With R = ±1 this is `R + λ ν`: novelty is worth the same whether the answer is right or wrong,
    while the paper's prose has novel wrong answers punished more; see `signed_novelty_reward`.

    Args:
      rewards: -1 or 1; on another scale the formula means something else, and concrete rewards
        draw a warning.
      novelty: in [0, 1], from `relative_novelty`.
      strength: λ ≥ 0; below 1, every right answer stays ahead of every wrong one.
      bound: c > 0.

    Returns:
      f32 `[B]`; not finite where the reward is not.

    Raises:
      ValueError: wrong dtype or unequal shapes, numbers out of range.

    Source: G2RL, 2025, arXiv 2512.15687; λ is not stated there.
    """
    _check_shape(rewards, novelty, strength, bound)
    if _checks.is_concrete(rewards):
        known = np.asarray(rewards)[np.isfinite(rewards)]
        if np.any(np.abs(known) != 1):
            warnings.warn(
                "rewards: expected -1 and 1, on which the printed formula rests; got others",
                stacklevel=2,
            )
    return _bounded(rewards, 1 + strength * rewards * novelty, bound)


def scaled_novelty_reward(
    rewards: Float[Array, " B"],
    novelty: Float[Array, " B"],
    *,
    strength: float,
    bound: float = 3.0,
) -> Float[Array, " B"]:
    """`clip(R (1 + λ ν), -c, c)`: novelty makes right answers better and wrong ones worse.

    Args, returns, raises: as in `printed_novelty_reward`, for rewards on any scale.

    Source: a reading of G2RL, 2025, arXiv 2512.15687.
    """
    _check_shape(rewards, novelty, strength, bound)
    return _bounded(rewards, 1 + strength * novelty, bound)


def signed_novelty_reward(
    rewards: Float[Array, " B"],
    novelty: Float[Array, " B"],
    *,
    strength: float,
    bound: float = 3.0,
) -> Float[Array, " B"]:
    """`clip(R (1 + λ (2ν - 1)), -c, c)`: what the paper's prose says.

    Novel right answers earn more and redundant ones less; novel wrong answers are punished more and
    redundant ones less.

    Args, returns, raises: as in `printed_novelty_reward`, for rewards on any scale.

    Source: the prose of G2RL, 2025, arXiv 2512.15687.
    """
    _check_shape(rewards, novelty, strength, bound)
    return _bounded(rewards, 1 + strength * (2 * novelty - 1), bound)


def _check_shape(rewards: Any, novelty: Any, strength: float, bound: float) -> None:
    _checks.floating(rewards=rewards, novelty=novelty)
    _checks.same_shape(rewards=rewards, novelty=novelty)
    _checks.in_range("strength", strength, 0.0, high_open=True)
    _checks.in_range("bound", bound, 0.0, low_open=True)


def _bounded(rewards: Array, factor: Array, bound: float) -> Array:
    return jnp.where(jnp.isfinite(rewards), jnp.clip(rewards * factor, -bound, bound), rewards)


def _directions(features: Any) -> Array:
    """Vectors of length 1 (0 stays 0), first scaled by their largest entry against under-flow."""
    x = jnp.asarray(features)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1.0)
