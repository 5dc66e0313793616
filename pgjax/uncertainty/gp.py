"""Posteriors of Gaussian processes under linear observations: kernels and two linear solves.

Integrals, temporal differences and values are all linear in the unknown function, so one formula
serves Bayesian quadrature, GP temporal differences and plain regression. It comes in two forms: in
the space of observations, at cubic cost in their number, and in the space of features, at cubic
cost in the number of those.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened


class GaussianPosterior(NamedTuple):
    """A Gaussian belief about E numbers, or about D independent columns of them.

    Attributes:
      mean: `[E]`, or `[E, D]`.
      covariance: `[E, E]`, of every column.
    """

    mean: Float[Array, "E ..."]
    covariance: Float[Array, "E E"]


def linear_kernel(x: Float[Array, "M F"], y: Float[Array, "P F"]) -> Float[Array, "M P"]:
    """The inner products `x_i · y_j`, `[M, P]`: linear functions without a constant.

    Raises:
      ValueError: ranks other than 2, unequal widths, a dtype that is not floating.
    """
    x, y = _points(x, y)
    return x @ y.T


def quadratic_kernel(x: Float[Array, "M F"], y: Float[Array, "P F"]) -> Float[Array, "M P"]:
    """`(1 + x_i · y_j)²`, `[M, P]`: polynomials of degree two.

    Raises:
      ValueError: as `linear_kernel`.
    """
    return jnp.square(1.0 + linear_kernel(x, y))


def gaussian_kernel(
    x: Float[Array, "M F"], y: Float[Array, "P F"], *, width: float
) -> Float[Array, "M P"]:
    """`exp(-‖x_i - y_j‖² / (2 width²))`, `[M, P]`.

    Raises:
      ValueError: as `linear_kernel`; a `width` ≤ 0.
    """
    _checks.in_range("width", width, 0.0, low_open=True)
    x, y = _points(x, y)
    square = jnp.sum(jnp.square(x[:, None] - y[None]), axis=-1)
    return jnp.exp(-0.5 * square / width**2)


def linear_gp_posterior(
    gram: Float[Array, "M M"],
    targets: Float[Array, "P ..."],
    cross: Float[Array, "M E"],
    prior: Float[Array, "E E"],
    *,
    noise: Float[Array, "P P"] | float,
    observe: Float[Array, "P M"] | None = None,
) -> GaussianPosterior:
    """What linear observations of a Gaussian process say about linear functionals of it.

    With f ~ N(0, K) at M points, y = H f + ε with ε ~ N(0, Σ), and E numbers ρ whose covariance
    with f is b and among themselves b₀,

        E[ρ | y] = bᵀ Hᵀ (H K Hᵀ + Σ)⁻¹ y,    Cov[ρ | y] = b₀ - bᵀ Hᵀ (H K Hᵀ + Σ)⁻¹ H b.

    Args:
      gram: K, symmetric and positive semi-definite.
      targets: y; columns share K, H and Σ and are independent of each other.
      cross: b, f's covariance with ρ.
      prior: b₀.
      noise: Σ, or a variance ≥ 0 for all observations.
      observe: H; None for the identity, where P = M.

    Returns:
      mean and covariance, float32 or wider; without observations (P = 0) they are 0 and `prior`.
      The machine epsilon times its trace is added to the diagonal of the matrix inverted, so that
      rounding does not make it indefinite: with noise 0 and functionals that K does not determine
      the result depends on it.

    Raises:
      ValueError: wrong ranks, shapes or dtypes, a negative variance, a concrete `gram` that is not
        symmetric.

    Source: O'Hagan 1991, "Bayes-Hermite quadrature"; Rasmussen and Ghahramani 2003, "Bayesian
    Monte Carlo"; with H, Engel, Mannor and Meir 2005.
    """
    _checks.rank("gram", gram, 2)
    _checks.rank("targets", targets, 1, 2)
    _checks.rank("noise", noise, 0, 2)
    points = np.shape(gram)[0]
    functionals = np.shape(cross)[-1] if np.ndim(cross) else 0
    count = points if observe is None else np.shape(observe)[0]
    _shaped("gram", gram, (points, points))
    _shaped("observe", observe, (count, points))
    _shaped("targets", targets, (count, *np.shape(targets)[1:]))
    _shaped("cross", cross, (points, functionals))
    _shaped("prior", prior, (functionals, functionals))
    _checks.floating(gram=gram, targets=targets, cross=cross, prior=prior, observe=observe)
    symmetric("gram", gram)
    _check_noise(noise, count)
    dtype = jnp.promote_types(jnp.result_type(gram, targets, cross, prior), jnp.float32)
    k, y, b, b0 = (jnp.asarray(x, dtype) for x in (gram, targets, cross, prior))
    if count == 0:
        return GaussianPosterior(jnp.zeros((functionals, *y.shape[1:]), dtype), b0)
    if observe is not None:
        h = jnp.asarray(observe, dtype)
        k, b = h @ k @ h.T, h @ b
    sigma = jnp.asarray(noise, dtype)
    total = k + (sigma if sigma.ndim else sigma * jnp.eye(count, dtype=dtype))
    solved = _solve(total, b)
    return GaussianPosterior(solved.T @ y, _symmetrised(b0 - b.T @ solved))


def weight_space_posterior(
    features_gram: Float[Array, "F F"],
    features_targets: Float[Array, "F ..."],
    cross: Float[Array, "F E"],
    prior: Float[Array, "E E"],
    *,
    noise: float,
) -> GaussianPosterior:
    """`linear_gp_posterior` of f = Φ w with w ~ N(0, I), from two sums over the observations.

        E[ρ | y] = bᵀ (ΦᵀΦ + s²)⁻¹ Φᵀ y,    Cov[ρ | y] = b₀ - bᵀ (ΦᵀΦ + s²)⁻¹ ΦᵀΦ b,

    with b = Cov[w, ρ]. Both sums can be accumulated, so that memory does not grow with time.

    Args:
      features_gram: ΦᵀΦ.
      features_targets: Φᵀ y.
      cross: b, the weights' covariance with ρ.
      prior: b₀.
      noise: s², the variance of each observation, ≥ 0.

    Returns:
      as `linear_gp_posterior`, and with the same addition to the diagonal. With noise 0 it is least
      squares where ΦᵀΦ is regular.

    Raises:
      ValueError: as `linear_gp_posterior`.

    Source: Rasmussen and Williams 2006, section 2.1.
    """
    _checks.rank("features_gram", features_gram, 2)
    _checks.rank("features_targets", features_targets, 1, 2)
    _checks.in_range("noise", noise, 0.0)
    size = np.shape(features_gram)[0]
    functionals = np.shape(cross)[-1] if np.ndim(cross) else 0
    _shaped("features_gram", features_gram, (size, size))
    _shaped("features_targets", features_targets, (size, *np.shape(features_targets)[1:]))
    _shaped("cross", cross, (size, functionals))
    _shaped("prior", prior, (functionals, functionals))
    named = {"features_gram": features_gram, "features_targets": features_targets}
    _checks.floating(**named, cross=cross, prior=prior)
    symmetric("features_gram", features_gram)
    dtype = jnp.promote_types(jnp.result_type(*named.values(), cross, prior), jnp.float32)
    s, y, b, b0 = (jnp.asarray(x, dtype) for x in (*named.values(), cross, prior))
    solved = _solve(s + jnp.asarray(noise, dtype) * jnp.eye(size, dtype=dtype), b)
    return GaussianPosterior(solved.T @ y, _symmetrised(b0 - solved.T @ (s @ b)))


def symmetric(name: str, matrix: Any) -> None:
    """Raises ValueError unless a concrete square matrix is symmetric up to rounding."""
    if _checks.is_concrete(matrix) and np.size(matrix):
        x = np.asarray(matrix)
        worst, scale = float(np.max(np.abs(x - x.T))), float(np.max(np.abs(x)))
        if worst > 1e-4 * scale:
            raise ValueError(
                f"{name}: expected a symmetric matrix, got entries that differ by {worst:.3g} from "
                "their mirror images"
            )


def _solve(matrix: Float[Array, "P P"], right: Float[Array, "P E"]) -> Float[Array, "P E"]:
    size = matrix.shape[0]
    jitter = jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)
    factor = jnp.linalg.cholesky(matrix + jitter * jnp.eye(size, dtype=matrix.dtype))
    return jax.scipy.linalg.cho_solve((factor, True), right)


def _symmetrised(x: Array) -> Array:
    return 0.5 * (x + x.T)


def _points(x: Any, y: Any) -> tuple[Array, Array]:
    _checks.rank("x", x, 2)
    _checks.rank("y", y, 2)
    _checks.floating(x=x, y=y)
    if np.shape(x)[1] != np.shape(y)[1]:
        raise ValueError(f"y: expected points of {np.shape(x)[1]} entries, got {np.shape(y)}")
    return widened(x), widened(y)


def _shaped(name: str, value: Any, wanted: tuple[int, ...]) -> None:
    if value is not None and np.shape(value) != wanted:
        raise ValueError(f"{name}: expected shape {wanted}, got {np.shape(value)}")


def _check_noise(noise: Any, count: int) -> None:
    if np.ndim(noise) == 0:
        _checks.in_range("noise", noise, 0.0)
    else:
        _shaped("noise", noise, (count, count))
        symmetric("noise", noise)
