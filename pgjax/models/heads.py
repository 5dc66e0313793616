"""Small networks on top of hidden states."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.models.config import DecoderConfig

ValueHeadParams = dict[str, Array]
ScoreHeadParams = dict[str, Array]


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


def score_head_init(config: DecoderConfig, key: PRNGKeyArray) -> ScoreHeadParams:
    """Parameters of a linear head that scores whole sequences (a reward model's), all zero.

    Args:
      config: of the decoder whose hidden states it reads.
      key: unused, since nothing is random; taken as every `init` does.

    Returns:
      `kernel` f32[H] and `bias` f32[].
    """
    return value_head_init(config, key)


def score_head_apply(
    params: ScoreHeadParams, hidden: Float[Array, "B T H"], lengths: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Scores `hidden[b, lengths[b] - 1] · kernel + bias`: of each row's last real token, float32.

    transformers' `...ForSequenceClassification` with one label scores the same way, without bias.

    Args:
      params: from `score_head_init`, or `pretrained.load_reward_model`.
      hidden: of right-padded rows, any floating dtype.
      lengths: real tokens of each row, in [1, T].

    Returns:
      one score for each row.

    Raises:
      ValueError: wrong ranks or dtypes, another number of rows or width, and lengths out of range
        where they are on the host.
    """
    _checks.rank("hidden", hidden, 3)
    _checks.rank("lengths", lengths, 1)
    _checks.integer(lengths=lengths)
    rows, width = hidden.shape[:2]
    if lengths.shape != (rows,):
        raise ValueError(f"lengths: expected shape {(rows,)}, got {lengths.shape}")
    if (
        isinstance(lengths, np.ndarray)
        and rows
        and not 1 <= lengths.min() <= lengths.max() <= width
    ):
        raise ValueError(
            f"lengths: expected values in [1, {width}], got values in "
            f"[{lengths.min()}, {lengths.max()}]"
        )
    last = jnp.take_along_axis(hidden, (jnp.asarray(lengths) - 1)[:, None, None], axis=1)[:, 0]
    return value_head_apply(params, last)


def score_head_logical_axes() -> dict[str, tuple[str, ...]]:
    """Logical axis names of the score head's parameters, a tree like them."""
    return value_head_logical_axes()
