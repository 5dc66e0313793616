"""KL(policy ‖ reference): three estimators on sampled tokens, and the exact sum.

With d = log π - log π_ref on a token drawn from π, what an estimator's value averages to and what
its gradient averages to (tokens held fixed, as in a loss) are different questions; each docstring
answers both. Estimators: J. Schulman, "Approximating KL divergence" (2020). Gradients:
Y. Tang and R. Munos, "On a few pitfalls in KL divergence gradient estimation for RL" (2025).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.logprobs._common import at_least_float32
from pgjax.logprobs.logits import centred


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _bounded(d: Array, clamp: float) -> Array:
    return jnp.clip(d, -clamp, clamp)


@_bounded.defjvp
def _bounded_jvp(clamp: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    # An ordinary clip has gradient 0 outside, which would release exactly the tokens that are
    # furthest from the reference.
    return _bounded(primals[0], clamp), tangents[0]


def _log_ratio(logprobs: Array, reference_logprobs: Array, clamp: float) -> Array:
    _checks.same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
    _checks.floating(logprobs=logprobs, reference_logprobs=reference_logprobs)
    _checks.in_range("clamp", clamp, 0.0, 80.0, low_open=True)  # e^80 is still finite in f32
    policy, reference = at_least_float32(logprobs), at_least_float32(reference_logprobs)
    same = (policy == -jnp.inf) & (reference == -jnp.inf)  # ruled out by both: no difference
    d = jnp.where(same, 0.0, policy) - jnp.where(same, 0.0, reference)
    return _bounded(d, float(clamp))


def kl_k1(
    logprobs: Float[Array, "*shape"],
    reference_logprobs: Float[Array, "*shape"],
    *,
    clamp: float = 20.0,
) -> Float[Array, "*shape"]:
    """Log-ratio estimator of KL(policy ‖ reference), per token.

        k1 = d,   d = logprobs - reference_logprobs, bounded to ±clamp

    Value: unbiased, high variance, may be negative. GRADIENT: expectation 0, so it is useless as a
    loss term; subtracted from the reward (detached) it gives grad KL(policy ‖ reference).

    Args:
      logprobs: log-probs under the policy, any shape. Tokens are drawn from this policy.
      reference_logprobs: same shape, under the reference.
      clamp: bound on |d|, in (0, 80]. Beyond it the value stays at the bound, and the gradient is
        the one at the bound: bounded, but never released to zero as a plain clip would.

    Returns:
      f32, the inputs' shape; finite for any pair of log-probs, -inf included (-inf in both is
      d = 0).

    Raises:
      ValueError: on unequal shapes, non-floating dtypes, or a clamp outside (0, 80].

    Source: Schulman (2020). Departure: the clamp.
    """
    return _log_ratio(logprobs, reference_logprobs, clamp)


def kl_k2(
    logprobs: Float[Array, "*shape"],
    reference_logprobs: Float[Array, "*shape"],
    *,
    clamp: float = 20.0,
) -> Float[Array, "*shape"]:
    """Half squared log-ratio: second-order estimator of KL(policy ‖ reference), per token.

        k2 = d² / 2,   d = logprobs - reference_logprobs, bounded to ±clamp

    Value: biased, right to second order in the distance. GRADIENT: d ∇log π, whose expectation is
    exactly grad KL(policy ‖ reference). The one to use as an on-policy loss term.

    Args, Returns, Raises: as `kl_k1`.

    Source: Schulman (2020). Departure: the clamp.
    """
    return 0.5 * _log_ratio(logprobs, reference_logprobs, clamp) ** 2


def kl_k3(
    logprobs: Float[Array, "*shape"],
    reference_logprobs: Float[Array, "*shape"],
    *,
    clamp: float = 20.0,
) -> Float[Array, "*shape"]:
    """Control-variate estimator of KL(policy ‖ reference), per token.

        k3 = exp(-d) - 1 + d,   d = logprobs - reference_logprobs, bounded to ±clamp

    Value: unbiased and never negative. GRADIENT: (1 - exp(-d)) ∇log π, whose expectation is
    grad KL(reference ‖ policy): the *other* direction. `kl_k3_straight_through` has this value
    with the right gradient.

    Args, Returns, Raises: as `kl_k1`. The value is at most exp(clamp) + clamp.

    Source: Schulman (2020); the KL term of GRPO (2024, arXiv 2402.03300). Departure: the clamp.
    """
    d = _log_ratio(logprobs, reference_logprobs, clamp)
    return jnp.expm1(-d) + d


def kl_k3_straight_through(
    logprobs: Float[Array, "*shape"],
    reference_logprobs: Float[Array, "*shape"],
    *,
    clamp: float = 20.0,
) -> Float[Array, "*shape"]:
    """ "k3+": the value of `kl_k3` with the gradient of `kl_k2`.

        out = stop_gradient(k3) + k2 - stop_gradient(k2)

    Value: unbiased and never negative. GRADIENT: d ∇log π, whose expectation is exactly
    grad KL(policy ‖ reference).

    Args, Returns, Raises: as `kl_k1`. The value is at most exp(clamp) + clamp.

    Source: "k3+" of the verl library, which follows the gradient analysis above. Departure: the
    clamp, which here never releases the gradient.
    """
    d = _log_ratio(logprobs, reference_logprobs, clamp)
    k2 = 0.5 * d**2
    k3 = jax.lax.stop_gradient(jnp.expm1(-d) + d)
    return k3 + (k2 - jax.lax.stop_gradient(k2))


def kl_categorical(
    logits: Float[Array, "*batch V"], reference_logits: Float[Array, "*batch V"]
) -> Float[Array, "*batch"]:
    """Exact KL(policy ‖ reference) of two categorical distributions.

        KL = Σ_v p_v (log p_v - log q_v),   p = softmax(logits),   q = softmax(reference_logits)

    Summed as Σ_v [p_v (log p_v - log q_v) - p_v + q_v], equal because both sum to 1: every term is
    non-negative, and a rounding error in either normaliser enters only to second order, so small
    divergences keep their digits.

    Args:
      logits: `[..., V]` of the policy, any floating dtype. -inf rules a token out.
      reference_logits: same shape.

    Returns:
      f32 `[...]`. A token that the policy rules out adds nothing (0 log 0 = 0), so a policy row of
      -inf only has divergence 0. Where the policy
      gives weight to a token the reference rules out, the divergence is +inf, and its gradient is
      defined as zero. Differentiable in both arguments.

    Raises:
      ValueError: on unequal shapes, a scalar, an empty vocabulary or non-floating dtypes.
    """
    if jnp.ndim(logits) < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., V >= 1], got {jnp.shape(logits)}")
    _checks.same_shape(logits=logits, reference_logits=reference_logits)
    _checks.floating(logits=logits, reference_logits=reference_logits)
    d, log_total = centred(at_least_float32(logits))
    log_p = d - log_total
    d, log_total = centred(at_least_float32(reference_logits))
    log_q = d - log_total
    in_p, in_q = log_p > -jnp.inf, log_q > -jnp.inf
    both = in_p & in_q
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    difference = jnp.where(both, log_p, 0.0) - jnp.where(both, log_q, 0.0)
    total = jnp.where(in_p.any(-1), (p * difference - p + q).sum(-1), 0.0)
    return jnp.where((in_p & ~in_q).any(-1), jnp.inf, total)
