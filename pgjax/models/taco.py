"""The networks of TACO: codes of states and of sequences of actions, and what is told from both.

z = tanh(LN(A e)), e the features of an image; c(a) = B₂ tanh(B₁ a); v = tanh(LN(C [c(a_t), ...,
c(a_{t+K-1})])); g = MLP([z, v]) is to be the z of K steps later, MLP([z, v]) the reward until then.

Source: Zheng et al. 2023 (TACO), arXiv 2306.13229.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.models import functional, mlp


def token_size(action_size: int) -> int:
    """⌊1.25 A⌋ + 1, the entries of an action's code."""
    return int(1.25 * action_size) + 1


def init_squashed(key: PRNGKeyArray, before: int, after: int) -> dict[str, Array]:
    """Of `squashed`: an orthogonal kernel, a zero bias, and LayerNorm's scale and offset."""
    (layer,) = mlp.init(key, (before, after))
    return {**layer, "scale": jnp.ones(after), "offset": jnp.zeros(after)}


def squashed(params: dict[str, Array], x: Float[Array, "*B F"]) -> Float[Array, "*B D"]:
    """tanh(LN(A x))."""
    x = x @ params["kernel"] + params["bias"]
    return jnp.tanh(functional.layer_norm(x, params["scale"], params["offset"], epsilon=1e-5))


def init_actions(key: PRNGKeyArray, action_size: int, *, length: int) -> dict[str, Any]:
    """Of `token` and `sequence_code`, for sequences of so many actions.

    Raises:
      ValueError: an `action_size` or a `length` below 1.
    """
    _checks.in_range("action_size", action_size, 1)
    _checks.in_range("length", length, 1)
    token_key, sequence_key = jax.random.split(key)
    size = token_size(action_size)
    return {
        "token": mlp.init(token_key, (action_size, 64, size)),
        "sequence": init_squashed(sequence_key, length * size, length * size),
    }


def token(params: dict[str, Any], actions: Float[Array, "*B A"]) -> Float[Array, "*B d"]:
    """c(a), each action's own code."""
    return mlp.apply(params["token"], actions)


def sequence_code(params: dict[str, Any], actions: Float[Array, "*B K A"]) -> Float[Array, "*B Kd"]:
    """v, the code of the K actions in their order.

    Raises:
      ValueError: actions of another number than the parameters are for.
    """
    found = token(params, actions)
    wanted = params["sequence"]["kernel"].shape[0]
    if np.ndim(actions) < 2 or found.shape[-2] * found.shape[-1] != wanted:
        raise ValueError(
            f"actions: expected {wanted // found.shape[-1]} of them on the last axis but one, got "
            f"shape {np.shape(actions)}"
        )
    return squashed(params["sequence"], found.reshape(*found.shape[:-2], -1))


def init_heads(
    key: PRNGKeyArray,
    image_features: int,
    action_size: int,
    *,
    length: int,
    feature_size: int = 50,
    hidden: int = 1024,
) -> dict[str, Any]:
    """`state` of `squashed`, `next` and `reward` of `joint`, and `weight`, the logits' matrix.

    Raises:
      ValueError: a size below 1.
    """
    sizes = {"image_features": image_features, "action_size": action_size, "length": length}
    for name, size in {**sizes, "feature_size": feature_size, "hidden": hidden}.items():
        _checks.in_range(name, size, 1)
    state_key, next_key, reward_key, weight_key = jax.random.split(key, 4)
    joined = feature_size + length * token_size(action_size)
    return {
        "state": init_squashed(state_key, image_features, feature_size),
        "next": mlp.init(next_key, (joined, hidden, feature_size)),
        "reward": mlp.init(reward_key, (joined, hidden, 1)),
        "weight": jax.random.uniform(weight_key, (feature_size, feature_size)),
    }


def joint(
    params: mlp.Params, state: Float[Array, "*B D"], code: Float[Array, "*B Kd"]
) -> Float[Array, "*B E"]:
    """MLP([z, v]) with a ReLU between its layers."""
    return mlp.apply(params, jnp.concatenate([state, code], axis=-1), activation=jax.nn.relu)
