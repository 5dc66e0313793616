"""A multilayer perceptron as two functions, for agents on vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Params = list[dict[str, Array]]


def init(
    key: PRNGKeyArray,
    sizes: Sequence[int],
    *,
    gain: float = 2**0.5,
    last_gain: float = 1.0,
) -> Params:
    """Orthogonal kernels and zero biases.

    Args:
      key: of the kernels.
      sizes: of the input, of each hidden layer, of the output.
      gain: scale of the hidden layers' kernels.
      last_gain: scale of the last one's; 0.01 is usual for policies, so that they start alike in
        all states.

    Returns:
      for each layer `kernel` f32 `[from, to]` and `bias` f32 `[to]`.

    Raises:
      ValueError: fewer than two sizes, or one below 1.

    Source: Saxe et al. 2013, arXiv 1312.6120; gains as in the PPO reference implementation.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes: expected at least two numbers of at least 1, got {tuple(sizes)}")
    layers: Params = []
    keys = jax.random.split(key, len(sizes) - 1)
    for own, (before, after) in zip(keys, itertools.pairwise(sizes), strict=True):
        scale = last_gain if len(layers) == len(sizes) - 2 else gain
        kernel = jax.nn.initializers.orthogonal(scale)(own, (before, after), jnp.float32)
        layers.append({"kernel": kernel, "bias": jnp.zeros(after)})
    return layers


def apply(
    params: Params,
    x: Float[Array, "*B I"],
    *,
    activation: Callable[[Any], Any] = jnp.tanh,
) -> Float[Array, "*B O"]:
    """The network's output; the activation stands between layers, not behind the last."""
    for layer in params[:-1]:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]
