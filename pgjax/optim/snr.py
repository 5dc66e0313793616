"""Step sizes from the gradient's signal-to-noise ratio.

For an L-smooth objective one step of size η along an unbiased gradient estimate g gains at least
`η ‖∇J‖² - (L η² / 2) (‖∇J‖² + tr Cov g)` in expectation, which is largest at

    η* = (1/L) SNR / (1 + SNR),    SNR = ‖∇J‖² / tr Cov g.

The base learning rate plays 1/L; the factor behind it is estimated from microbatch gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pgjax import _checks


class GradientMoments(NamedTuple):
    """Of a mean gradient: its squared norm, and the estimated variance of that mean; f32 scalars.

    `square_norm - variance` is an unbiased estimate of the true gradient's squared norm.
    """

    square_norm: Float[Array, ""]
    variance: Float[Array, ""]


class SnrState(NamedTuple):
    """Moving averages of the squared norm without its noise, and of the noise; f32 scalars."""

    signal: Float[Array, ""]
    noise: Float[Array, ""]


def gradient_moments(gradients: Any) -> GradientMoments:
    """Moments of the mean of M microbatch gradients: `V = Σ_m ‖g_m - ḡ‖² / (M (M - 1))`.

    Args:
      gradients: a pytree whose leaves are `[M, ...]`, M at least 2, each row an unbiased estimate
        of the same gradient. Shares of a sum (as in gradient accumulation) are M times smaller
        than that: multiply them by M.

    Raises:
      ValueError: no leaves, fewer than two microbatches, unequal numbers of them.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(gradients)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"gradients: expected leaves with the same number of rows, got {sorted(sizes)}"
        )
    ((count,),) = sizes
    _check_count("gradients", count)
    wide = _wide(gradients)
    mean = jax.tree.map(lambda g: g.mean(0), wide)
    spread = jax.tree.map(lambda g, m: g - m, wide, mean)
    return GradientMoments(_square_norm(mean), _square_norm(spread) / (count * (count - 1)))


def gradient_moments_from_norms(
    square_norms: Float[Array, " M"], mean_gradient: Any
) -> GradientMoments:
    """`gradient_moments` where microbatch gradients were summed up one after the other.

    `V = (mean_m ‖g_m‖² - ‖ḡ‖²) / (M - 1)`: one number per microbatch has to be kept, not its
    gradient. Noise below about 1e-7 of the squared norm is lost to rounding.

    Args:
      square_norms: `‖g_m‖²`, M at least 2.
      mean_gradient: the pytree `ḡ = mean_m g_m`.

    Raises:
      ValueError: wrong rank or dtype, fewer than two microbatches.
    """
    _checks.rank("square_norms", square_norms, 1)
    _checks.floating(square_norms=square_norms)
    count = jnp.shape(square_norms)[0]
    _check_count("square_norms", count)
    square_norm = _square_norm(mean_gradient)
    excess = jnp.mean(jnp.asarray(square_norms, square_norm.dtype)) - square_norm
    return GradientMoments(square_norm, jnp.maximum(excess, 0.0) / (count - 1))


def snr_factor(signal: Float[Array, ""], noise: Float[Array, ""]) -> Float[Array, ""]:
    """`SNR / (1 + SNR) = signal / (signal + noise)`, the share of 1/L that is the best step.

    Args:
      signal: squared norm of the gradient; an estimate below 0 counts as 0.
      noise: trace of the covariance of its estimate, at least 0.

    Returns:
      f32 scalar in [0, 1]; 1 where both are 0.
    """
    signal = jnp.maximum(signal, 0.0)
    total = signal + noise
    return jnp.where(total > 0, signal / jnp.where(total > 0, total, 1.0), 1.0)


def scale_by_gradient_snr(
    *, decay: float = 0.9, min_scale: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the gradient's `SNR / (1 + SNR)`, held in [min_scale, 1].

    `update(updates, state, params, moments=...)` takes the `GradientMoments` of the raw gradient,
    so it may stand anywhere in a chain: behind Adam's scaling, say, which would undo a factor put
    before it. In `optax.chain`, the argument is passed to the chain's own `update`.

    Args:
      decay: of the moving averages of signal and noise, in [0, 1).
      min_scale: smallest factor, in [0, 1].

    Raises:
      ValueError: an option out of range; on update, `moments` missing.

    Source: OBLR-PO, 2025, arXiv 2511.23310, whose constants are not known here; the defaults are
    chosen. What is averaged is `square_norm - variance` as it is, and only the average is cut at 0:
    cut at every step, pure noise would look like signal. There is no ε, so the factor does not
    depend on the gradients' scale.
    """
    _checks.in_range("decay", decay, 0.0, 1.0, high_open=True)
    _checks.in_range("min_scale", min_scale, 0.0, 1.0)

    def init(params: Any) -> SnrState:
        del params
        return SnrState(jnp.zeros([]), jnp.zeros([]))

    def update(
        updates: Any,
        state: SnrState,
        params: Any = None,
        *,
        moments: GradientMoments | None = None,
        **others: Any,
    ) -> tuple[Any, SnrState]:
        del params, others
        if moments is None:
            raise ValueError(
                "moments: expected the gradient's GradientMoments as a keyword of update, got None"
            )
        # Both averages start at 0, which their ratio does not notice.
        signal = decay * state.signal + (1 - decay) * (moments.square_norm - moments.variance)
        noise = decay * state.noise + (1 - decay) * moments.variance
        factor = jnp.clip(snr_factor(signal, noise), min_scale, 1.0)
        scaled = jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates)
        return scaled, SnrState(signal, noise)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_count(name: str, count: int) -> None:
    if count < 2:
        raise ValueError(f"{name}: expected at least 2 microbatches, got {count}")


def _square_norm(tree: Any) -> Array:
    return optax.tree.norm(_wide(tree), squared=True)


def _wide(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)), tree
    )
