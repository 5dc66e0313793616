"""One convolution before a layer-normalised perceptron: a network for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.models import functional, layer_norm_mlp


def init(
    key: PRNGKeyArray,
    shape: Sequence[int],
    sizes: Sequence[int],
    *,
    channels: int = 16,
    window: int = 3,
) -> dict[str, Any]:
    """Kernel of the convolution, orthogonal with gain √2, and the perceptron behind it.

    Args:
      key: of the kernels.
      shape: of an image, `(H, W, C)`.
      sizes: of the perceptron's hidden layers and of the output.
      channels: F of the convolution.
      window: k of its k x k window, no larger than the image.

    Returns:
      `convolution` with `kernel` f32 `[k k C, F]`, `bias`, `scale` and `offset` f32 `[F]`, and
      `mlp` as from `layer_norm_mlp.init`.

    Raises:
      ValueError: a shape that is not an image's, a window that does not fit, a number below 1.
    """
    if len(shape) != 3:
        raise ValueError(f"shape: expected (height, width, channels), got {tuple(shape)}")
    _checks.in_range("channels", channels, 1)
    _checks.in_range("window", window, 1, min(shape[:2]))
    height, width, depth = shape
    own, rest = jax.random.split(key)
    kernel = jax.nn.initializers.orthogonal(2**0.5)(own, (window**2 * depth, channels))
    features = (height - window + 1) * (width - window + 1) * channels
    return {
        "convolution": {
            "kernel": kernel,
            "bias": jnp.zeros(channels),
            "scale": jnp.ones(channels),
            "offset": jnp.zeros(channels),
        },
        "mlp": layer_norm_mlp.init(rest, (features, *sizes)),
    }


def apply(
    params: dict[str, Any],
    x: Float[Array, "*B H W C"],
    *,
    activation: Callable[[Any], Any] = jax.nn.relu,
    epsilon: float = 1e-6,
) -> Float[Array, "*B O"]:
    """The network's output: convolution without padding, LayerNorm, activation, the perceptron.

    The normalisation is over the channels of each place. The convolution is a product of matrices
    with the windows laid side by side: under `vmap` over parameters that stays one batched product,
    where a convolution becomes one in groups, which is slow on CPUs.

    Source: the MinAtar network of PQN, Gallici et al. 2024, arXiv 2407.04811.
    """
    layer = params["convolution"]
    window = round((layer["kernel"].shape[0] / x.shape[-1]) ** 0.5)
    height, width = x.shape[-3] - window + 1, x.shape[-2] - window + 1
    shifted = [
        x[..., i : i + height, j : j + width, :] for i in range(window) for j in range(window)
    ]
    found = jnp.concatenate(shifted, axis=-1) @ layer["kernel"] + layer["bias"]
    found = functional.layer_norm(found, layer["scale"], layer["offset"], epsilon=epsilon)
    flat = activation(found).reshape(*x.shape[:-3], -1)
    return layer_norm_mlp.apply(params["mlp"], flat, activation=activation, epsilon=epsilon)
