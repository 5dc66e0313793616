"""A multilayer perceptron with layer normalisation before each activation, as two functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax.models import functional, mlp


def init(
    key: PRNGKeyArray,
    sizes: Sequence[int],
    *,
    gain: float = 2**0.5,
    last_gain: float = 1.0,
) -> mlp.Params:
    """`mlp.init`, and for each hidden layer a `scale` of ones and an `offset` of zeros.

    Raises:
      ValueError: fewer than two sizes, or one below 1.
    """
    *hidden, last = mlp.init(key, sizes, gain=gain, last_gain=last_gain)
    normalized = [
        {**layer, "scale": jnp.ones_like(layer["bias"]), "offset": jnp.zeros_like(layer["bias"])}
        for layer in hidden
    ]
    return [*normalized, last]


def apply(
    params: mlp.Params,
    x: Float[Array, "*B I"],
    *,
    activation: Callable[[Any], Any] = jax.nn.relu,
    epsilon: float = 1e-6,
) -> Float[Array, "*B O"]:
    """The network's output: Dense, LayerNorm, activation by turns; the last layer is only Dense.

    What comes out of a normalised layer of width H has norm at most √H before scale and offset,
    however large its input, so that without them |out| ≤ ‖w‖ √H + |bias|.

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450; its place as in PQN, Gallici et al. 2024,
    arXiv 2407.04811.
    """
    for layer in params[:-1]:
        x = x @ layer["kernel"] + layer["bias"]
        x = activation(functional.layer_norm(x, layer["scale"], layer["offset"], epsilon=epsilon))
    return x @ params[-1]["kernel"] + params[-1]["bias"]
