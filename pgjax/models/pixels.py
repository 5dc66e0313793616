"""Convolutions over images for agents that see pixels, and the shifts that augment them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.models import mlp

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def init(
    key: PRNGKeyArray,
    image: tuple[int, int, int],
    *,
    channels: int = 32,
    strides: Sequence[int] = (2, 1, 1, 1),
) -> mlp.Params:
    """Orthogonal 3 x 3 kernels of gain √2 and zero biases, one layer for each stride.

    Args:
      key: of the kernels.
      image: height, width and channels of what is seen.
      channels: of every layer.
      strides: of the layers; nothing is padded.

    Returns:
      for each layer `kernel` f32 `[3, 3, from, channels]` and `bias` f32 `[channels]`.

    Raises:
      ValueError: an image that is not square or of which the layers leave nothing, a count below 1.

    Source: DrQ-v2, Yarats et al. 2021, arXiv 2107.09645.
    """
    _checks.in_range("channels", channels, 1)
    output_size(image, channels=channels, strides=strides)
    layers: mlp.Params = []
    before = image[2]
    for own in jax.random.split(key, len(strides)):
        flat = jax.nn.initializers.orthogonal(2**0.5)(own, (9 * before, channels), jnp.float32)
        layers.append({"kernel": flat.reshape(3, 3, before, channels), "bias": jnp.zeros(channels)})
        before = channels
    return layers


def output_size(
    image: tuple[int, int, int], *, channels: int = 32, strides: Sequence[int] = (2, 1, 1, 1)
) -> int:
    """Entries of what `apply` makes of an image.

    Raises:
      ValueError: an image that is not square, or of which the layers leave nothing; no layer.
    """
    if len(image) != 3 or image[0] != image[1] or image[2] < 1:
        raise ValueError(f"image: expected a square and its channels, got {tuple(image)}")
    if not strides or min(strides) < 1:
        raise ValueError(f"strides: expected numbers of at least 1, got {tuple(strides)}")
    side = image[0]
    for stride in strides:
        side = (side - 3) // stride + 1 if side >= 3 else 0
    if side < 1:
        raise ValueError(f"image: {image[0]} pixels are too few for strides {tuple(strides)}")
    return side * side * channels


def apply(
    params: mlp.Params, images: Array, *, strides: Sequence[int] = (2, 1, 1, 1)
) -> Float[Array, "*B F"]:
    """The images through the layers, a ReLU behind each, as vectors.

    Args:
      params: from `init`.
      images: uint8 `[..., H, W, C]`; pixels / 255 - 1/2 go in.
      strides: those of `init`.

    Raises:
      ValueError: images that are not uint8, or of rank below 3.
    """
    shape = _image("images", images)
    x = jnp.asarray(images).reshape(-1, *shape).astype(jnp.float32) / 255.0 - 0.5
    for layer, stride in zip(params, strides, strict=True):
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "VALID", dimension_numbers=_DIMENSIONS
        )
        x = jax.nn.relu(x + layer["bias"])
    return x.reshape(*np.shape(images)[:-3], -1)


def random_shift(key: PRNGKeyArray, images: Array, *, pad: int = 4) -> Array:
    """Each image moved by up to `pad` pixels along both axes, its border repeated outwards.

    Args:
      key: of the shifts, one for each image.
      images: uint8 `[B, H, W, C]`.
      pad: ≥ 0.

    Returns:
      uint8 of the same shape.

    Raises:
      ValueError: images that are not uint8 or not of rank 4, a `pad` below 0.

    Source: DrQ, Kostrikov et al. 2020, arXiv 2004.13649; in whole pixels as in DrQ-v2.
    """
    _checks.in_range("pad", pad, 0)
    _checks.rank("images", images, 4)
    height, width, channels = _image("images", images)
    wide = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    starts = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pad + 1)

    def cut(image: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*start, 0), (height, width, channels))

    return jax.vmap(cut)(wide, starts)


def _image(name: str, images: Array) -> tuple[int, ...]:
    shape = np.shape(images)
    if len(shape) < 3:
        raise ValueError(f"{name}: expected shape [..., H, W, C], got {shape}")
    if jnp.result_type(images) != jnp.uint8:
        raise ValueError(f"{name}: expected uint8, got {jnp.result_type(images)}")
    return shape[-3:]
