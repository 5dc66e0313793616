"""How well a few runs determine a method's score: robust means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks


def interquartile_mean(scores: Float[Array, ...]) -> Float[Array, ""]:
    """Mean of the middle half of all scores, pooled over runs and tasks.

    A quarter of the scores is cut from either end, `floor(n / 4)` of them, as in
    `scipy.stats.trim_mean(scores, 0.25)`. Less at the mercy of one bad run than the mean, and with
    smaller intervals than the median.

    Args:
      scores: of any shape, at least one; real.

    Returns:
      f32 scalar (at least); the mean itself below four scores, NaN if any score is NaN.

    Raises:
      ValueError: no score.

    Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
    Precipice", arXiv 2108.13264.
    """
    x = _float(scores).ravel()
    if not x.size:
        raise ValueError(f"scores: expected at least one, got shape {jnp.shape(scores)}")
    cut = x.size // 4
    # Sorting puts NaN last, where the cut would hide it.
    return jnp.mean(jnp.sort(x)[cut : x.size - cut]) + 0.0 * jnp.sum(x)


def stratified_bootstrap(
    scores: Float[Array, "R K ..."],
    statistic: Callable[[Float[Array, "R K ..."]], Array],
    key: PRNGKeyArray,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[Array, Array]:
    """Percentile interval of a statistic, when runs are drawn again within every task.

    Each resample draws R runs with replacement *for each task by itself*, so every task stays in
    it with R runs; the interval holds the middle `confidence` of the statistic over resamples.

    Args:
      scores: runs (seeds) by tasks; further axes, such as one of methods or of time, are kept
        together. One task: `[R, 1]`.
      statistic: of one such array, for instance `interquartile_mean`.
      key: for drawing.
      resamples: ≥ 1.
      confidence: in (0, 1).

    Returns:
      low and high, each of the statistic's shape. Both are the statistic where R is 1: a single
      run says nothing of the spread.

    Raises:
      ValueError: fewer than two axes, an empty one, or options out of range.

    Source: Agarwal et al. 2021, arXiv 2108.13264; Efron 1979.
    """
    x = _float(scores)
    if x.ndim < 2 or not x.size:
        raise ValueError(f"scores: expected runs by tasks [R, K, ...], got shape {x.shape}")
    _checks.in_range("resamples", resamples, 1)
    _checks.in_range("confidence", confidence, 0.0, 1.0, low_open=True, high_open=True)
    runs, tasks = x.shape[:2]

    def one(key: PRNGKeyArray) -> Array:
        drawn = jax.random.randint(key, (runs, tasks), 0, runs)
        return statistic(x[drawn, jnp.arange(tasks)])

    found = jax.vmap(one)(jax.random.split(key, resamples))
    tail = (1.0 - confidence) / 2
    low, high = jnp.quantile(found, jnp.array([tail, 1.0 - tail], found.dtype), axis=0)
    return low, high


def _float(scores: Float[Array, ...]) -> Array:
    x = jnp.asarray(scores)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
