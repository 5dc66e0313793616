"""The policy gradient from single transitions, given a Gaussian-process critic (BAC)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pgjax import _checks, returns
from pgjax._arrays import widened
from pgjax.advantages import bayes
from pgjax.uncertainty import gp


def bac_gradient(
    scores: Float[Array, "N n"],
    state_gram: Float[Array, "N N"],
    rewards: Float[Array, " N"],
    terminated: Bool[Array, " N"],
    fisher: Float[Array, "n n"],
    *,
    discount: float,
    noise: float,
    fisher_scale: float = 1.0,
    mask: Bool[Array, " N"] | None = None,
) -> gp.GaussianPosterior:
    """Bayesian actor-critic: the gradient given a GP temporal-difference critic.

    Q ~ GP(0, k_x(x, x') + c u(z)ᵀ G⁻¹ u(z')), rewards `r = H Q + ε` with H the differences
    `Q_t - γ Q_{t+1}` along episodes and `Cov[ε] = s² H Hᵀ`. With `α = Hᵀ (H K Hᵀ + s² H Hᵀ)⁻¹ r`

        E[∇η] = c U α,    Cov[∇η] = c G - c² U Hᵀ (H K Hᵀ + s² H Hᵀ)⁻¹ H Uᵀ.

    Over whole episodes H is regular, so this is `α = (K + s²)⁻¹ R` with the discounted returns to
    go R = H⁻¹ r. That form is computed: it is not harmed by γ near 1, where H nearly loses rank.
    The state kernel shapes the critic and drops out of the integral, because E_a[u(x, a)] = 0.

    Args:
      scores: u, `∇ log π(a_t | x_t)` of each transition.
      state_gram: k_x between all visited states.
      rewards: r.
      terminated: the episode ends with this transition. Transitions stand in order of time, one
        episode after the other; an episode cut off before its end has no return and cannot take
        part.
      fisher: `G = E[Σ_t γ^t u_t u_tᵀ]`, positive definite: of the discounted, not normalised
        occupancy, so that the gradient is that of the discounted return.
      discount: γ in [0, 1).
      noise: s² ≥ 0.
      fisher_scale: c > 0, the prior variance of Q along the scores; the paper's 1.
      mask: transitions that count; None for all. The others are as if they were not there.

    Returns:
      mean `[n]` and covariance `[n, n]`; without transitions 0 and c G.

    Raises:
      ValueError: as `whitened_scores`; wrong shapes; a discount outside [0, 1), a negative noise, a
        scale ≤ 0; a last transition that does not terminate.

    Source: BAC, arXiv 2604.27563; critic by Engel, Mannor and Meir 2005.
    """
    _checks.in_range("discount", discount, 0.0, 1.0, high_open=True)
    _checks.in_range("noise", noise, 0.0)
    _checks.in_range("fisher_scale", fisher_scale, 0.0, low_open=True)
    if mask is not None:
        _checks.boolean(mask=mask)
        _checks.rank("scores", scores, 2)
        bayes.same_rows(np.shape(scores)[0], mask=mask)
        scores = jnp.where(jnp.asarray(mask)[:, None], scores, 0.0)
    white = bayes.whitened_scores(scores, fisher)
    count = white.shape[0]
    r = bayes.column(rewards, white, name="rewards")
    _checks.boolean(terminated=terminated)
    _checks.floating(state_gram=state_gram)
    bayes.same_rows(count, terminated=terminated)
    bayes.square_of("state_gram", state_gram, count)
    prior = fisher_scale * widened(fisher)
    if count == 0:
        return gp.GaussianPosterior(jnp.zeros(white.shape[1], white.dtype), prior)
    counts = jnp.ones(count, bool) if mask is None else jnp.asarray(mask)
    _check_last(terminated, counts)
    goes_on = discount * (1.0 - jnp.asarray(terminated, white.dtype))
    to_go = returns.discounted(r.astype(white.dtype), goes_on, mask=mask)
    gram = jnp.asarray(state_gram, white.dtype) + fisher_scale * gp.linear_kernel(white, white)
    gram = jnp.where(counts[:, None] & counts, gram, 0.0)
    cross = fisher_scale * widened(scores)
    # What does not count has no covariance with anything; 1 keeps its row regular at noise 0.
    variance = jnp.diag(jnp.where(counts, noise, 1.0).astype(white.dtype))
    return gp.linear_gp_posterior(gram, to_go, cross, prior, noise=variance)


def _check_last(terminated: Any, counts: Array) -> None:
    """An episode without an end would be given a return that stops where the data does."""
    last = counts.shape[0] - 1 - jnp.argmax(counts[::-1])
    ends = jnp.asarray(terminated)[last] | ~jnp.any(counts)
    bayes.require(ends, "terminated: expected true at the last transition that counts, got false")
