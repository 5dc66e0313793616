"""How many directions a representation uses."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgjax import _checks
from pgjax._arrays import widened


def representation_rank(
    features: Float[Array, "*b N D"], *, threshold: float = 0.01
) -> Int[Array, "*b"]:
    """#{i: σ_i(Φ / √N) > ε}, singular values of the features of N samples.

    `spectra.effective_rank` is the rank that needs no threshold, and does not see the scale.

    Args:
      features: Φ, one row a sample, `[..., N, D]`.
      threshold: ε ≥ 0.

    Returns:
      int32 `[...]`, from 0 to min(N, D).

    Raises:
      ValueError: rank below 2, a wrong dtype, no rows, ε below 0.

    Source: Lyle et al. 2022, arXiv 2204.09560; with ε = .01 and N = 2048 in BEER, He et al. 2024,
    arXiv 2404.12754.
    """
    _checks.in_range("threshold", threshold, 0.0)
    _checks.floating(features=features)
    if jnp.ndim(features) < 2 or 0 in jnp.shape(features)[-2:]:
        raise ValueError(
            f"features: expected shape [..., N, D] with N and D ≥ 1, got {jnp.shape(features)}"
        )
    wide = widened(features)
    found = jnp.linalg.svd(wide / wide.shape[-2] ** 0.5, compute_uv=False)
    return jnp.sum(found > threshold, axis=-1, dtype=jnp.int32)
