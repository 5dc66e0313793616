"""Sequences that the policy wrote without knowing what it wanted."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks

MAJORITY_ENTROPY = math.log(2.0)


def entropy_gate(
    mean_entropy: Float[Array, " B"],
    initial_entropy: float | Float[Array, ""],
    *,
    threshold: float = MAJORITY_ENTROPY,
) -> Bool[Array, " B"]:
    """True for sequences of mean entropy up to the threshold, or all if training began above it.

    `H_initial > threshold or H_i <= threshold`. Without a majority token, `max_v p(v) <= 1/2`, the
    entropy is at least ln 2: at or above the default threshold no token need be preferred, below
    it one is.

    Args:
      mean_entropy: mean over a sequence's tokens of the policy's entropy, in nats.
      initial_entropy: the same of the policy before training, averaged over sequences; may be
        traced. 0 applies the test always, as the authors' code does (with threshold 0.7).
      threshold: in nats, > 0.

    Returns:
      bool `[B]`.

    Raises:
      ValueError: wrong rank or dtype, a threshold that is not positive.

    Source: GTPO, 2025, arXiv 2508.03772.
    """
    _checks.rank("mean_entropy", mean_entropy, 1)
    _checks.floating(mean_entropy=mean_entropy)
    _checks.in_range("threshold", threshold, 0.0, low_open=True)
    return jnp.logical_or(jnp.asarray(initial_entropy) > threshold, mean_entropy <= threshold)
