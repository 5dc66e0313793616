"""Policy gradients by Bayesian quadrature: a belief about the gradient instead of an average.

The gradient is an integral, `∇η = ∫ R(ξ) u(ξ) Pr(ξ; θ) dξ` with the score `u = ∇ log Pr`. A
Gaussian process for a part of the integrand makes it Gaussian given samples, and with kernels built
from the Fisher information `G = E[u uᵀ]` its mean and covariance have closed forms. Model 1 places
the process on `R u`, one for each coordinate, with kernel `(1 + u'ᵀ G⁻¹ u)²`; model 2 on R, with
kernel `u'ᵀ G⁻¹ u`. `bac_gradient` places it on Q(x, a) and sees single transitions.

All are linear in what was observed and shrink towards 0 where little was: their length says how
much is known, not only how steep the objective is. A return is a plain number here, so rewards to
go or centred returns serve as well.

Source: Ghavamzadeh, Engel and Valko 2016, arXiv 2604.27563.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened
from pgjax.uncertainty import gp


def fisher_matrix(
    scores: Float[Array, "M n"], *, weights: Float[Array, " M"] | None = None, damping: float = 0.0
) -> Float[Array, "n n"]:
    """`Σ_i w_i u_i u_iᵀ + damping I` with weights 1 / M: the Fisher information from samples.

    For the actor-critic form the weights are γ^t / (number of episodes) of each transition.

    Args:
      scores: u, of trajectories or of transitions.
      weights: w ≥ 0; None for 1 / M.
      damping: ≥ 0; with fewer samples than parameters the sum alone is singular.

    Raises:
      ValueError: wrong ranks or dtypes, no sample, unequal lengths, a negative damping.
    """
    _checks.rank("scores", scores, 2)
    _checks.floating(scores=scores, weights=weights)
    _checks.in_range("damping", damping, 0.0)
    count, size = np.shape(scores)
    if count == 0:
        raise ValueError(f"scores: expected at least one row, got shape {np.shape(scores)}")
    u = widened(scores)
    if weights is None:
        weights = jnp.full(count, 1.0 / count, u.dtype)
    same_rows(count, weights=weights)
    return u.T @ (jnp.asarray(weights)[:, None] * u) + damping * jnp.eye(size, dtype=u.dtype)


def fisher_inverse_update(
    inverse: Float[Array, "n n"], score: Float[Array, " n"], *, step: float
) -> Float[Array, "n n"]:
    """The inverse of `(1 - z) G + z u uᵀ` from that of G, without inverting anything.

    `(G⁻¹ - z (G⁻¹u)(G⁻¹u)ᵀ / (1 - z + z uᵀG⁻¹u)) / (1 - z)`; with z = 1 / i at the i-th sample,
    from i = 2 and the identity on, it is the inverse of the mean of I and the samples' products.

    Args:
      inverse: G⁻¹, symmetric.
      score: u.
      step: z in [0, 1); 1 would leave a matrix of rank one.

    Raises:
      ValueError: wrong shapes or dtypes, a step outside [0, 1).

    Source: Sherman and Morrison 1950.
    """
    _checks.rank("inverse", inverse, 2)
    _checks.floating(inverse=inverse, score=score)
    square_of("inverse", inverse, np.size(score))
    gp.symmetric("inverse", inverse)
    _checks.in_range("step", step, 0.0, 1.0, high_open=True)
    g, u = widened(inverse), widened(score)
    along = g @ u
    return (g - step * jnp.outer(along, along) / (1.0 - step + step * u @ along)) / (1.0 - step)


def whitened_scores(
    scores: Float[Array, "M n"], fisher: Float[Array, "n n"]
) -> Float[Array, "M n"]:
    """`L⁻¹ u` with G = L Lᵀ, whose inner products are the Fisher kernel `u'ᵀ G⁻¹ u`.

    What `uncertainty.ald_update` takes as points, with `linear_kernel` for model 2 and
    `quadratic_kernel` for model 1.

    Raises:
      ValueError: wrong ranks, shapes or dtypes; a concrete `fisher` that is not symmetric and
        positive definite (under jit that is an error of checkify, and else NaN).
    """
    u, factor = scores_and_factor(scores, fisher)
    return jax.scipy.linalg.solve_triangular(factor, u.T, lower=True).T


def bpg_model_1(
    scores: Float[Array, "M n"],
    trajectory_returns: Float[Array, " M"],
    fisher: Float[Array, "n n"],
    *,
    noise: float,
) -> gp.GaussianPosterior:
    """The gradient with a process on `R u`: `Y C b`, covariance `(1 + n - bᵀ C b) I`.

    `K_ij = (1 + u_iᵀ G⁻¹ u_j)²`, `C = (K + s²)⁻¹`, `b_i = 1 + u_iᵀ G⁻¹ u_i`, row i of Y is R_i u_i.
    Exact without noise wherever R u is a polynomial of degree two in u and enough samples differ.

    Args:
      scores: of trajectories, or of independent samples.
      trajectory_returns: R.
      fisher: G, positive definite.
      noise: s² ≥ 0, the variance of each observation.

    Returns:
      mean `[n]` and covariance `[n, n]`; without samples 0 and (1 + n) I.

    Raises:
      ValueError: as `whitened_scores`; unequal lengths; a negative noise.

    Source: BPG, arXiv 2604.27563, model 1.
    """
    white = whitened_scores(scores, fisher)
    values = column(trajectory_returns, white)
    cross = 1.0 + jnp.sum(jnp.square(white), axis=1, keepdims=True)
    found = gp.linear_gp_posterior(
        gp.quadratic_kernel(white, white),
        values[:, None] * widened(scores),
        cross,
        prior_of_model_1(white),
        noise=noise,
    )
    return of_every_coordinate(found)


def bpg_model_2(
    scores: Float[Array, "M n"],
    trajectory_returns: Float[Array, " M"],
    fisher: Float[Array, "n n"],
    *,
    noise: float,
) -> gp.GaussianPosterior:
    """The gradient with a process on R: `U C R`, covariance `G - U C Uᵀ`, `C = (UᵀG⁻¹U + s²)⁻¹`.

    U has the scores as columns. With `G = U Uᵀ / M` it is the sample average of R u times
    `M / (M + s²)`. The kernel holds no constant, so the returns had better be centred.

    Args, raises: as `bpg_model_1`.

    Returns:
      mean `[n]` and covariance `[n, n]`; without samples 0 and G. With noise 0 and more samples
      than parameters use `bpg_natural_gradient`, which stays regular.

    Source: BPG, arXiv 2604.27563, model 2.
    """
    white = whitened_scores(scores, fisher)
    values = column(trajectory_returns, white)
    return gp.linear_gp_posterior(
        gp.linear_kernel(white, white), values, widened(scores), widened(fisher), noise=noise
    )


def bpg_natural_gradient(
    scores: Float[Array, "M n"],
    trajectory_returns: Float[Array, " M"],
    fisher: Float[Array, "n n"],
    *,
    noise: float,
) -> gp.GaussianPosterior:
    """Model 2's natural gradient, `G⁻¹ E[∇η] = (U Uᵀ + s² G)⁻¹ U R`: ridge regression of R on u.

    It costs the cube of the parameters' number instead of the samples'; G times the mean is
    `bpg_model_2`'s.

    Args, raises: as `bpg_model_1`.

    Returns:
      mean `[n]` and covariance `[n, n]`; without samples 0 and G⁻¹.

    Source: derived from model 2 by the matrix inversion lemma.
    """
    u, factor = scores_and_factor(scores, fisher)
    values = column(trajectory_returns, u)
    white = jax.scipy.linalg.solve_triangular(factor, u.T, lower=True).T
    # θ = L⁻ᵀ w with w ~ N(0, I) has covariance G⁻¹, and u · θ = (L⁻¹ u) · w.
    eye = jnp.eye(factor.shape[0], dtype=factor.dtype)
    unwhiten = jax.scipy.linalg.solve_triangular(factor, eye, lower=True)
    return gp.weight_space_posterior(
        white.T @ white, white.T @ values, unwhiten, unwhiten.T @ unwhiten, noise=noise
    )


def scores_and_factor(scores: Any, fisher: Any) -> tuple[Array, Array]:
    """The scores, and the checked Fisher matrix's lower triangular root."""
    _checks.rank("scores", scores, 2)
    _checks.rank("fisher", fisher, 2)
    _checks.floating(scores=scores, fisher=fisher)
    square_of("fisher", fisher, np.shape(scores)[1])
    gp.symmetric("fisher", fisher)
    dtype = jnp.promote_types(jnp.result_type(scores, fisher), jnp.float32)
    factor = jnp.linalg.cholesky(jnp.asarray(fisher, dtype))
    definite = jnp.all(jnp.diag(factor) > 0)
    require(
        definite,
        "fisher: expected a positive definite matrix, got a singular or indefinite one; "
        "`fisher_matrix` can add a damping",
    )
    return jnp.asarray(scores, dtype), factor


def prior_of_model_1(white: Array) -> Array:
    """`∬ (1 + u'ᵀG⁻¹u)² = 1 + n`, `[1, 1]`."""
    return jnp.full((1, 1), 1.0 + white.shape[1], white.dtype)


def of_every_coordinate(found: gp.GaussianPosterior) -> gp.GaussianPosterior:
    """Independent processes of one covariance, as a vector."""
    mean = found.mean[0]
    return gp.GaussianPosterior(mean, found.covariance[0, 0] * jnp.eye(mean.size, dtype=mean.dtype))


def require(holds: Array, message: str) -> None:
    """Raises ValueError where a concrete bool is false; checks with checkify where it is traced."""
    if not _checks.is_concrete(holds):
        _checks.traced(holds, message)
    elif not bool(holds):
        raise ValueError(message)


def column(values: Any, rows: Any, *, name: str = "trajectory_returns") -> Array:
    """The numbers, float32 or wider, one for each row."""
    _checks.rank(name, values, 1)
    _checks.floating(**{name: values})
    same_rows(np.shape(rows)[0], **{name: values})
    return widened(values)


def same_rows(count: int, **arrays: Any) -> None:
    """Raises ValueError unless every array (None is skipped) is `[count]`."""
    for name, x in arrays.items():
        if x is not None and np.shape(x) != (count,):
            raise ValueError(f"{name}: expected shape {(count,)}, got {np.shape(x)}")


def square_of(name: str, matrix: Any, size: int) -> None:
    """Raises ValueError unless the matrix is `[size, size]`."""
    if np.shape(matrix) != (size, size):
        raise ValueError(f"{name}: expected shape {(size, size)}, got {np.shape(matrix)}")
