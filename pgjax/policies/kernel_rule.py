"""Decision rules of many agents from a few numbers: kernels around anchors.

A rule π(·|y) over actions, for any observation y, is a blend of M distributions that belong to
anchors y_1 … y_M, by how near these are:

  π(·|y) = Σ_b w_b(y) p_b,  w_b(y) = κ(y_b, y) / Σ_c κ(y_c, y),  κ(y, y') = exp(-|y - y'|²/(2 s²)).

Its parameters ξ, f32 `[M, 2 A]`, hold mean and log standard deviation of each p_b, a Gaussian; or
`[M, U]`, logits over U actions. With nearest anchors in place of the kernel, the limit of s → 0, it
is a histogram's rule, constant within each bin.

Source: Dec-POMFC, Cui et al. 2023, arXiv 2307.06175.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.policies import mixture


def rbf_weights(
    observations: Float[Array, "*B D"],
    anchors: Float[Array, "M D"],
    *,
    bandwidth: float,
    period: float | None = None,
) -> Float[Array, "*B M"]:
    """w_b(y) = κ(y_b, y) / Σ_c κ(y_c, y); rows sum to 1 however far y is from all anchors.

    Args:
      observations: y.
      anchors: y_b, distinct.
      bandwidth: s > 0.
      period: of each coordinate, where they are angles (2π); None: they are not.

    Raises:
      ValueError: a bandwidth or a period of 0 or below, sizes that differ; where values can be
        looked at, anchors or angles that are not finite, and two anchors in one place.
    """
    _checks.in_range("bandwidth", bandwidth, 0.0, low_open=True)
    squared = _squared_distances(observations, anchors, period)
    return jax.nn.softmax(-squared / (2.0 * bandwidth**2), axis=-1)


def nearest_weights(
    observations: Float[Array, "*B D"],
    anchors: Float[Array, "M D"],
    *,
    period: float | None = None,
) -> Float[Array, "*B M"]:
    """1 for the nearest anchor, the first of equals, and 0 for the others: a histogram's bins.

    Raises:
      ValueError: as `rbf_weights`.
    """
    squared = _squared_distances(observations, anchors, period)
    return jax.nn.one_hot(jnp.argmin(squared, axis=-1), squared.shape[-1])


def kernel_rule_sample(
    key: PRNGKeyArray, xi: Float[Array, "M 2A"], weights: Float[Array, "*B M"]
) -> Float[Array, "*B A"]:
    """Actions u ~ π(·|y) of all agents, each with noise of its own: an anchor b ~ w, then u ~ p_b.

    Args:
      key: of anchors and actions.
      xi: ξ, mean and log standard deviation of each anchor's Gaussian.
      weights: of each agent's observation.

    Raises:
      ValueError: sizes that differ, an odd number of columns of ξ.
    """
    rule = _mixture(xi, weights)
    return mixture.gaussian_mixture().sample(key, rule)


def kernel_rule_log_prob(
    xi: Float[Array, "M 2A"], weights: Float[Array, "*B M"], actions: Float[Array, "*B A"]
) -> Float[Array, "*B"]:
    """log π(u|y) = log Σ_b w_b(y) N(u; μ_b, σ_b).

    Raises:
      ValueError: sizes that differ, an odd number of columns of ξ.
    """
    return mixture.gaussian_mixture().log_prob(_mixture(xi, weights), actions)


def interpolated_rule_sample(
    key: PRNGKeyArray, xi: Float[Array, "M 2A"], weights: Float[Array, "*B M"]
) -> Float[Array, "*B A"]:
    """Actions of a rule with the same ξ that blends parameters, u ~ N(Σ_b w_b μ_b, Σ_b w_b σ_b).

    It has one peak where the mixture has several, and the same mean; with nearest anchors both are
    the same rule.

    Raises:
      ValueError: sizes that differ, an odd number of columns of ξ.
    """
    mean, log_std = _halves(xi, weights)
    noise = jax.random.normal(key, (*weights.shape[:-1], mean.shape[-1]))
    return weights @ mean + (weights @ jnp.exp(log_std)) * noise


def discrete_rule(xi: Float[Array, "M U"], weights: Float[Array, "*B M"]) -> Float[Array, "*B U"]:
    """Probabilities of U actions, π(·|y) = Σ_b w_b(y) softmax(ξ_b), each row of which sums to 1.

    Raises:
      ValueError: sizes that differ.
    """
    _same_anchors(xi, weights)
    return weights @ jax.nn.softmax(xi, axis=-1)


def mean_field_features(
    states: Float[Array, "N D"],
    anchors: Float[Array, "M D"],
    *,
    bandwidth: float,
    period: float | None = None,
) -> Float[Array, " M"]:
    """φ_b(μ) = ∫ κ(x_b, x) μ(dx), normalised over b, of the empirical distribution of N states.

    Neither the agents' order nor their number shows, but for how far N of them are from μ.

    Raises:
      ValueError: no states, and as `rbf_weights`.
    """
    _checks.in_range("bandwidth", bandwidth, 0.0, low_open=True)
    _checks.rank("states", states, 2)
    _checks.in_range("number of states", jnp.shape(states)[0], 1)
    squared = _squared_distances(states, anchors, period)
    # Normalised in logs, for kernels that are all but 0.
    masses = jax.nn.logsumexp(-squared / (2.0 * bandwidth**2), axis=0)
    return jax.nn.softmax(masses)


def anchor_grid(low: float, high: float, *, number: int, size: int = 1) -> Float[Array, "M D"]:
    """`number` anchors along each of `size` axes, in the middle of equal parts of [low, high].

    On a circle, low and high are one turn apart.

    Raises:
      ValueError: counts below 1, a `high` that is not above `low`.
    """
    _checks.in_range("number", number, 1)
    _checks.in_range("size", size, 1)
    _checks.in_range("high", high, low, low_open=True)
    middle = low + (high - low) * (jnp.arange(number) + 0.5) / number
    grid = jnp.meshgrid(*[middle] * size, indexing="ij")
    return jnp.stack([x.reshape(-1) for x in grid], axis=-1)


def _squared_distances(
    points: Float[Array, "*B D"], anchors: Float[Array, "M D"], period: float | None
) -> Float[Array, "*B M"]:
    _checks.rank("anchors", anchors, 2)
    if jnp.ndim(points) < 1 or jnp.shape(points)[-1] != jnp.shape(anchors)[-1]:
        raise ValueError(
            f"observations: expected {jnp.shape(anchors)[-1]} entries like the anchors, "
            f"got shape {jnp.shape(points)}"
        )
    _checks.in_range("number of anchors", jnp.shape(anchors)[0], 1)
    if _checks.is_concrete(anchors):
        _check_anchors(np.asarray(anchors))
    finite = jnp.isfinite(points).all()
    if _checks.is_concrete(points) and not bool(finite):
        raise ValueError("observations: expected finite numbers, got NaN or infinity")
    _checks.traced(finite, "observations: expected finite numbers")
    away = points[..., None, :] - anchors
    if period is not None:
        _checks.in_range("period", period, 0.0, low_open=True)
        away = away - period * jnp.round(away / period)
    return jnp.square(away).sum(-1)


def _check_anchors(anchors: Float[np.ndarray, "M D"]) -> None:
    if not np.isfinite(anchors).all():
        raise ValueError("anchors: expected finite numbers, got NaN or infinity")
    if len(np.unique(anchors, axis=0)) < len(anchors):
        raise ValueError("anchors: expected distinct points, got one twice")


def _halves(xi: Array, weights: Array) -> tuple[Array, Array]:
    _same_anchors(xi, weights)
    if xi.shape[1] % 2:
        raise ValueError(f"xi: expected means and log standard deviations, got shape {xi.shape}")
    return xi[:, : xi.shape[1] // 2], xi[:, xi.shape[1] // 2 :]


def _mixture(xi: Array, weights: Array) -> mixture.Mixture:
    mean, log_std = _halves(xi, weights)
    shape = (*weights.shape, mean.shape[-1])
    # A histogram's weights are 0 but for one, and log 0 = -inf rules an anchor out.
    return mixture.Mixture(
        jnp.log(weights), jnp.broadcast_to(mean, shape), jnp.broadcast_to(log_std, shape)
    )


def _same_anchors(xi: Array, weights: Int[Array, "*B M"]) -> None:
    _checks.rank("xi", xi, 2)
    if weights.shape[-1] != xi.shape[0]:
        raise ValueError(
            f"xi: expected a row for each of {weights.shape[-1]} anchors, got shape {xi.shape}"
        )
