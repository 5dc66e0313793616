"""Accuracy of several samples for each prompt: pass@k, maj@k and an honest interval."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pgjax import _checks


def pass_at_k(correct: Bool[Array, "P G"], *, k: int) -> Float[Array, " P"]:
    """The unbiased estimate of the probability that at least one of k samples is correct.

    With c of G samples correct, 1 - C(G-c, k) / C(G, k) = 1 - prod_{i=G-c+1}^{G} (1 - k/i): the
    share of all subsets of k samples with a correct one. The product needs no large binomials.

    Args:
      correct: bool `[P, G]`, G samples of each of P prompts.
      k: subset size, in [1, G].

    Returns:
      f32 `[P]`, one estimate per prompt.

    Raises:
      ValueError: wrong rank or dtype, or k outside [1, G].

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (2021,
    arXiv:2107.03374).
    """
    _checks.rank("correct", correct, 2)
    _checks.boolean(correct=correct)
    samples = np.shape(correct)[1]
    _checks.in_range("k", k, 1, samples)
    count = jnp.asarray(correct).sum(axis=1, keepdims=True)
    i = jnp.arange(1, samples + 1)
    # Where fewer than k samples are wrong the range contains i = k, whose factor is exactly 0.
    factors = jnp.where(i > samples - count, 1 - k / i.astype(jnp.float32), 1.0)
    return 1 - jnp.prod(factors, axis=1)


def majority_at_k(
    pred: Int[Array, "P G"], ok: Bool[Array, "P G"], ref: Int[Array, " P"], *, k: int
) -> Float[Array, " P"]:
    """How often the most frequent answer of k samples is the right one.

    The G samples are cut into G/k consecutive blocks; in each the answer given most often wins,
    the smallest one in a tie, and samples without an answer do not vote. Averaging disjoint blocks
    is unbiased for the accuracy of a majority of k independent samples.

    Args:
      pred: integer `[P, G]`, answers.
      ok: bool `[P, G]`, whether the sample has an answer.
      ref: integer `[P]`, right answers.
      k: block size, a divisor of G.

    Returns:
      f32 `[P]`, the share of blocks won by the right answer; a block without any answer is wrong.

    Raises:
      ValueError: wrong rank or dtype, unequal shapes, or k that does not divide G.

    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning" (2022,
    arXiv:2203.11171).
    """
    _checks.rank("pred", pred, 2)
    _checks.rank("ref", ref, 1)
    _checks.same_shape(pred=pred, ok=ok)
    _checks.integer(pred=pred, ref=ref)
    _checks.boolean(ok=ok)
    prompts, samples = np.shape(pred)
    if np.shape(ref) != (prompts,):
        raise ValueError(f"ref: expected shape {(prompts,)}, got {np.shape(ref)}")
    if k < 1 or samples % k:
        raise ValueError(f"k: expected a divisor of the {samples} samples, got {k}")
    votes = jnp.asarray(pred).reshape(prompts, samples // k, k)
    valid = jnp.asarray(ok).reshape(votes.shape)
    same = (votes[..., :, None] == votes[..., None, :]) & valid[..., None, :]
    count = jnp.where(valid, same.sum(axis=-1), 0)
    leads = valid & (count == count.max(axis=-1, keepdims=True))
    largest = jnp.iinfo(votes.dtype).max
    winner = jnp.where(leads, votes, largest).min(axis=-1)
    right = (winner == jnp.asarray(ref)[:, None]) & valid.any(axis=-1)
    return right.astype(jnp.float32).mean(axis=1)


def accuracy_interval(
    correct: Shaped[Array, "P G"], *, z: float = 1.959964
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Mean accuracy with an interval that knows that samples of one prompt are not independent.

    Wilson's score interval at an effective sample size. With p the mean, m_i the mean of prompt i
    and v = sum_i (m_i - p)^2 / (P (P-1)) the cluster-robust variance of p, the effective size is
    n = p(1-p)/v, kept within [P, P G]; then

        centre = (p + z^2/2n) / (1 + z^2/n),
        half width = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).

    When all samples agree (p is 0 or 1) or there is a single prompt, n = P: nothing shows that the
    samples of a prompt would bring independent information. G = 1 gives Wilson's interval itself.

    Args:
      correct: bool (or 0/1, or scores in [0, 1]) `[P, G]`.
      z: normal quantile; the default gives 95 %.

    Returns:
      mean, low, high: f32 scalars, 0 <= low <= mean <= high <= 1 up to rounding.

    Raises:
      ValueError: wrong rank, no samples, or z not above 0.

    Source: Wilson (1927); design effect after Kish (1965).
    """
    _checks.rank("correct", correct, 2)
    _checks.in_range("z", z, 0, low_open=True)
    prompts, samples = np.shape(correct)
    if not prompts or not samples:
        raise ValueError(f"correct: expected at least one sample, got shape {(prompts, samples)}")
    means = jnp.asarray(correct).astype(jnp.float32).mean(axis=1)
    p = means.mean()
    spread = p * (1 - p)
    variance = ((means - p) ** 2).sum() / (prompts * max(prompts - 1, 1))
    # No spread between prompts at a mean strictly inside (0, 1) is the full size, by the limit.
    full = jnp.float32(prompts * samples)
    ratio = jnp.where(variance > 0, spread / jnp.where(variance > 0, variance, 1), full)
    n = jnp.clip(ratio, prompts, full)
    n = jnp.where((spread > 0) & (prompts > 1), n, jnp.float32(prompts))
    scale = 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / scale
    half = z * jnp.sqrt(spread / n + z**2 / (4 * n**2)) / scale
    return p, jnp.clip(centre - half, 0, 1), jnp.clip(centre + half, 0, 1)
