"""Networks that give the values of all actions at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pgjax.agents.networks import Network, num_actions, vector_size
from pgjax.envs.core import Discrete, Environment
from pgjax.models import layer_norm_convolution, layer_norm_mlp, mlp


def q_network(
    env: Environment,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> Network:
    """Values of all actions, `(params, observation [..., O]) -> [..., A]`.

    Raises:
      ValueError: observations that are not vectors, actions that are not discrete.
    """
    sizes = (vector_size(env), *hidden, num_actions(env))
    return Network(
        init=lambda key: mlp.init(key, sizes),
        apply=lambda params, observation: mlp.apply(params, observation, activation=activation),
    )


def layer_norm_q_network(
    env: Environment,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> Network:
    """`q_network` with layer normalisation before each activation, as PQN needs it.

    Raises:
      ValueError: observations that are not vectors, actions that are not discrete.

    Source: Gallici et al. 2024, arXiv 2407.04811.
    """
    sizes = (vector_size(env), *hidden, num_actions(env))
    return Network(
        init=lambda key: layer_norm_mlp.init(key, sizes),
        apply=lambda params, observation: layer_norm_mlp.apply(
            params, observation, activation=activation
        ),
    )


def convolutional_q_network(
    env: Environment,
    *,
    channels: int = 16,
    window: int = 3,
    hidden: Sequence[int] = (128,),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> Network:
    """Values of all actions from an image, `(params, observation [..., H, W, C]) -> [..., A]`.

    A convolution and a perceptron, layer normalisation before each activation.

    Raises:
      ValueError: observations that are not images, actions that are not discrete, a window larger
        than an image.

    Source: the MinAtar network of PQN, Gallici et al. 2024, arXiv 2407.04811.
    """
    kind = env.observation
    if isinstance(kind, Discrete) or len(kind.shape) != 3:
        raise ValueError(f"env.observation: expected height, width and channels, got {kind}")
    sizes = (*hidden, num_actions(env))
    return Network(
        init=lambda key: layer_norm_convolution.init(
            key, kind.shape, sizes, channels=channels, window=window
        ),
        apply=lambda params, observation: layer_norm_convolution.apply(
            params, observation.astype(jnp.float32), activation=activation
        ),
    )
