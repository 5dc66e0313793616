"""Rewards that carry no or wrong information: the controls of any claim that a reward teaches.

Source: "Reasoning or Memorization? Unreliable Results of Reinforcement Learning Due to Data
Contamination" (2025, arXiv:2507.10532).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.rewards.numeric import exact_reward


def random_reward(key: PRNGKeyArray, n: int, *, gamma: float) -> Float[Array, " n"]:
    """Bernoulli(gamma) rewards that never look at the completions.

    Args:
      key: random key.
      n: number of rewards, at least 0.
      gamma: probability of a reward of 1, in [0, 1]; the paper uses 0.5.

    Returns:
      f32 `[n]`, in {0, 1}.

    Raises:
      ValueError: gamma outside [0, 1], or a negative n.
    """
    _checks.in_range("gamma", gamma, 0, 1)
    _checks.in_range("n", n, 0)
    return jax.random.bernoulli(key, gamma, (n,)).astype(jnp.float32)


def inverted_reward(rewards: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """1 - r: what was good is bad.

    Args:
      rewards: in [0, 1], any shape.

    Returns:
      f32 (f64 for f64 input) of the same shape; NaN stays NaN.

    Raises:
      ValueError: not a floating dtype.
    """
    _checks.floating(rewards=rewards)
    r = jnp.asarray(rewards)
    return 1 - r.astype(jnp.promote_types(r.dtype, jnp.float32))


def majority_incorrect_label(
    pred: Int[Array, "P G"], ok: Bool[Array, "P G"], ref: Int[Array, " P"]
) -> tuple[Int[Array, " P"], Bool[Array, " P"]]:
    """The wrong answer a model gives most often to each prompt.

    Args:
      pred: integer `[P, G]`, answers.
      ok: bool `[P, G]`, whether the sample has an answer.
      ref: integer `[P]`, right answers.

    Returns:
      label: like `pred`, `[P]`, the most frequent wrong answer, the smallest in a tie; 0 where
        there is none.
      exists: bool `[P]`, whether any answer is wrong.

    Raises:
      ValueError: wrong rank or dtype, or unequal shapes.
    """
    _checks.rank("pred", pred, 2)
    _checks.same_shape(pred=pred, ok=ok)
    _checks.integer(pred=pred, ref=ref)
    _checks.boolean(ok=ok)
    if np.shape(ref) != np.shape(pred)[:1]:
        raise ValueError(f"ref: expected shape {np.shape(pred)[:1]}, got {np.shape(ref)}")
    pred = jnp.asarray(pred)
    wrong = jnp.asarray(ok) & (pred != jnp.asarray(ref)[:, None])
    same = (pred[:, :, None] == pred[:, None, :]) & wrong[:, None, :]
    count = jnp.where(wrong, same.sum(axis=-1), 0)
    leads = wrong & (count == count.max(axis=-1, keepdims=True))
    exists = wrong.any(axis=-1)
    label = jnp.where(leads, pred, jnp.iinfo(pred.dtype).max).min(axis=-1)
    return jnp.where(exists, label, 0), exists


def majority_incorrect_reward(
    pred: Int[Array, "P G"], ok: Bool[Array, "P G"], ref: Int[Array, " P"]
) -> Float[Array, "P G"]:
    """1 where a sample gives the most frequent wrong answer of its own group, else 0.

    The paper takes the label from the initial model once: there compute
    `label, exists = majority_incorrect_label(...)` from its samples, and reward later samples by
    `exact_reward(pred, label[:, None], ok & exists[:, None])`. This function is the two together.

    Args:
      pred: integer `[P, G]`, answers.
      ok: bool `[P, G]`, whether the sample has an answer.
      ref: integer `[P]`, right answers.

    Returns:
      f32 `[P, G]`, in {0, 1}; never 1 on a right answer, all 0 where no answer is wrong.

    Raises:
      ValueError: wrong rank or dtype, or unequal shapes.
    """
    label, exists = majority_incorrect_label(pred, ok, ref)
    return exact_reward(pred, label[:, None], jnp.asarray(ok) & exists[:, None])
