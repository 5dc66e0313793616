"""Bayesian policy gradients from a dictionary that stands for all samples, however many.

```
white = advantages.whitened_scores(scores, fisher)
keep = functools.partial(uncertainty.ald_update, kernel=uncertainty.linear_kernel, threshold=1e-3)
dictionary, projections = jax.lax.scan(keep, uncertainty.ald_init(capacity, white.shape[1]), white)
found = bpg_model_2_sparse(returns, fisher, dictionary, projections.coefficients, noise=0.1)
```
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened
from pgjax.advantages import bayes
from pgjax.uncertainty import gp
from pgjax.uncertainty.dictionary import Dictionary, ald_posterior


def bpg_model_1_sparse(
    scores: Float[Array, "M n"],
    trajectory_returns: Float[Array, " M"],
    dictionary: Dictionary,
    coefficients: Float[Array, "M C"],
    *,
    noise: float,
) -> gp.GaussianPosterior:
    """`bpg_model_1` with K ≈ A K̃ Aᵀ: `(Y A)(K̃ AᵀA + s²)⁻¹ b̃`.

    Args:
      scores: of all samples.
      trajectory_returns: of all samples.
      dictionary: of whitened scores, by `quadratic_kernel`.
      coefficients: A, of all samples.
      noise: s² ≥ 0.

    Raises:
      ValueError: wrong ranks, shapes or dtypes, a negative noise.

    Source: BPG, arXiv 2604.27563, online sparsification.
    """
    _checks.rank("scores", scores, 2)
    _checks.floating(scores=scores)
    values = bayes.column(trajectory_returns, scores)
    cross = 1.0 + jnp.sum(jnp.square(dictionary.points), axis=1, keepdims=True)
    prior = bayes.prior_of_model_1(dictionary.points)
    targets = values[:, None] * widened(scores)
    found = ald_posterior(dictionary, coefficients, targets, cross, prior, noise=noise)
    return bayes.of_every_coordinate(found)


def bpg_model_2_sparse(
    trajectory_returns: Float[Array, " M"],
    fisher: Float[Array, "n n"],
    dictionary: Dictionary,
    coefficients: Float[Array, "M C"],
    *,
    noise: float,
) -> gp.GaussianPosterior:
    """`bpg_model_2` with K ≈ A K̃ Aᵀ: `Ũ (AᵀA K̃ + s²)⁻¹ Aᵀ R`.

    Args:
      trajectory_returns: of all samples.
      fisher: G, by which the scores were whitened.
      dictionary: of whitened scores, by `linear_kernel`: of n points at most.
      coefficients: A, of all samples.
      noise: s² ≥ 0.

    Raises:
      ValueError: wrong ranks, shapes or dtypes, a negative noise.

    Source: as `bpg_model_1_sparse`.
    """
    points, factor = bayes.scores_and_factor(dictionary.points, fisher)
    values = bayes.column(trajectory_returns, coefficients)
    return ald_posterior(
        dictionary, coefficients, values, points @ factor.T, widened(fisher), noise=noise
    )
