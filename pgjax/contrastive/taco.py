"""Losses for features of control: what actions lead to, what stays under augmentation, rewards."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks
from pgjax._arrays import widened
from pgjax.contrastive.nce import bilinear_logits, info_nce


class TacoOutputs(NamedTuple):
    """What the networks say of a batch.

    Attributes:
      state: z of one view of the observation, `[B, D]`.
      other_view: z of another view of it, `[B, D]`.
      predicted: g, made of z and the code of the K actions that follow, `[B, D]`.
      following: z of the observation K steps later, `[B, D]`.
      reward: predicted from z and the code, `[B]`.
    """

    state: Float[Array, "B D"]
    other_view: Float[Array, "B D"]
    predicted: Float[Array, "B D"]
    following: Float[Array, "B D"]
    reward: Float[Array, " B"]


class TacoLosses(NamedTuple):
    """One of each for every row, to be averaged over those that count and added.

    Attributes:
      temporal: of finding the observation K steps later by the actions that led there.
      view: of finding another view of the same observation, CURL's.
      reward: squared error of the predicted reward.
    """

    temporal: Float[Array, " B"]
    view: Float[Array, " B"]
    reward: Float[Array, " B"]


def taco_losses(
    outputs: TacoOutputs,
    rewards: Float[Array, " B"],
    weight: Float[Array, "D D"],
    *,
    mask: Bool[Array, " B"] | None = None,
) -> TacoLosses:
    """InfoNCE of g_iᵀ W h_j and of z_iᵀ W z'_j with one W, and (R̂ - R)².

    h and z' are detached: what is looked for does not move towards what looks for it. The same
    encoder makes both; there is no averaged copy. log B less the mean temporal loss is a lower
    bound of the information that state and actions have of the later state.

    Args:
      outputs: of the networks.
      rewards: R, discounted and summed over the steps between, `[B]`; detached here.
      weight: W, `[D, D]`, differentiable.
      mask: rows that count, as anchors and as negatives; None for all.

    Returns:
      f32 `[B]` each, 0 where the mask is false.

    Raises:
      ValueError: as `bilinear_logits` and `info_nce`; rewards of another shape or dtype.

    Source: Zheng et al. 2023 (TACO), arXiv 2306.13229; the view's loss is that of CURL, Srinivas
    et al. 2020, arXiv 2004.04136, here without its averaged encoder.
    """
    _checks.floating(rewards=rewards, reward=outputs.reward)
    _checks.rank("rewards", rewards, 1)
    _checks.same_shape(reward=outputs.reward, rewards=rewards)
    wanted = jax.lax.stop_gradient((outputs.following, outputs.other_view, widened(rewards)))
    following, other_view, rewards = wanted
    error = jnp.square(widened(outputs.reward) - rewards)
    return TacoLosses(
        info_nce(bilinear_logits(outputs.predicted, following, weight), mask=mask),
        info_nce(bilinear_logits(outputs.state, other_view, weight), mask=mask),
        error if mask is None else jnp.where(mask, error, 0.0),
    )
