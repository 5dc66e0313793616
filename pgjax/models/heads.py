"""Small networks on top of hidden states."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.models.config import DecoderConfig

ValueHeadParams = dict[str, Array]


def value_head_init(config: DecoderConfig, key: PRNGKeyArray) -> ValueHeadParams:
    """Parameters of a linear value head, all zero, so that the first estimate is 0 everywhere.

    Args:
      config: of the decoder whose hidden states it reads.
      key: unused, since nothing is random; taken as every `init` does.

    Returns:
      `kernel` f32[H] and `bias` f32[].
    """
    del key
    return {
        "kernel": jnp.zeros(config.hidden_size, jnp.float32),
        "bias": jnp.zeros((), jnp.float32),
    }


def value_head_apply(
    params: ValueHeadParams, hidden: Float[Array, "*batch H"]
) -> Float[Array, "*batch"]:
    """Value estimates `hidden · kernel + bias`, float32.

    Args:
      params: from `value_head_init`.
      hidden: any floating dtype.

    Returns:
      the value of the state after each token. A rollout's value of token t is that of the state
      before it, one position to the left.

    Raises:
      ValueError: `hidden` is not floating, or of another width than the kernel.
    """
    _checks.floating(hidden=hidden)
    if hidden.shape[-1:] != params["kernel"].shape:
        raise ValueError(
            f"hidden: expected last axis {params['kernel'].shape[0]}, got shape {hidden.shape}"
        )
    return hidden.astype(jnp.float32) @ params["kernel"] + params["bias"]


def value_head_logical_axes() -> dict[str, tuple[str, ...]]:
    """Logical axis names of the value head's parameters, a tree like them."""
    return {"kernel": ("embed",), "bias": ()}
