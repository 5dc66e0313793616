"""Norms and activations as functions of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"],
    *,
    epsilon: float,
    scale_offset: float = 0.0,
) -> Float[Array, "*batch D"]:
    """`(offset + scale) · x / sqrt(mean(x²) + epsilon)` over the last axis.

    Args:
      x: any floating dtype; the statistics and the product are computed in float32.
      scale: learned, one per feature.
      epsilon: positive.
      scale_offset: what the scale is counted from.

    Returns:
      the normalised array, in the dtype of `x`.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    factor = scale.astype(jnp.float32)
    if scale_offset:
        factor = scale_offset + factor
    return (wide * inverse * factor).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    *,
    epsilon: float,
) -> Float[Array, "*batch D"]:
    """`scale · (x - mean(x)) / sqrt(var(x) + epsilon) + bias` over the last axis, in float32.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return (centred * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(
        x.dtype
    )


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def gated(name: str, gate: Float[Array, "*s"], up: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`activation(gate) · up`, and for "clamped_swiglu" what `DecoderConfig` says."""
    if name == "clamped_swiglu":
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
    return _ACTIVATIONS[name](gate) * up


def activated(name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The activation without a gate."""
    return _ACTIVATIONS[name](x)
