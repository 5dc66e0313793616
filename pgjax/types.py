"""The pytrees that flow through the library.

Shapes use `B` sequences, `T` tokens or time steps, `H` hidden units, `N` environments.
A token's log-prob is stored at the token's own index; positions where `mask` is false hold 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
from jaxtyping import Array, Bool, Float, Int

T_ = TypeVar("T_")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def pytree_dataclass(cls: type[T_]) -> type[T_]:
    """A frozen, keyword-only dataclass whose fields are all pytree children; adds `replace`."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    jax.tree_util.register_dataclass(
        cls,
        data_fields=[f.name for f in dataclasses.fields(cls)],  # type: ignore[arg-type]
        meta_fields=[],
    )
    return cls


class _Replaceable:
    def replace(self: T_, **changes: Any) -> T_:
        """A copy with the named fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@pytree_dataclass
class Rollout(_Replaceable):
    """A batch of sampled sequences and what is known of them; None where not known yet.

    Attributes:
      tokens: prompt and completion, right-padded.
      mask: true where the token was chosen by the policy (never prompt, padding or tool output).
      behavior_logprobs: log-probs under the policy that sampled, 0 where `mask` is false.
      rewards: one per sequence, or one per token.
      group_ids: samples of one prompt share an id; any integers, any order, any group size.
      truncated: true where the sequence ran out of length budget instead of stopping by itself.
      reference_logprobs: log-probs under the frozen reference policy.
      proximal_logprobs: log-probs under the learner's parameters before the first update on this
        batch; differs from `behavior_logprobs` when sampler and learner disagree numerically or
        the batch is stale.
      values: value estimates before the first update, for the state *in which* token t is chosen.
      advantages: filled by `Objective.prepare`; `[B]` or `[B, T]`.
      returns: value targets, filled by `Objective.prepare` of objectives that learn values.
      loss_weights: weight of each token's loss in the final sum; filled by the trainer for exact
        gradient accumulation, see `aggregate.weights`.
      trajectory_ids: rows of one trajectory share an id; None when each row is its own trajectory.
      turn_ids: turn of each token, -1 outside the policy's own turns.
      experts: the experts each layer sent each token to, where they are to be replayed; distinct
        for each token, at padding as well.
      old: outputs of the policy before the first update on this batch, with the optional fields
        that `Objective.old_needs` names; filled by the trainer.
      multipliers: per-token factors of the loss, filled by `Objective.prepare`.
      extras: further facts about each sequence by name, rows first, that some objectives read
        (`answer_ids`, `strata`, ...), and what an objective's `prepare` hands to its loss.
      memory: of an objective that has one, while `prepare` runs; None before and after.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    behavior_logprobs: Float[Array, "B T"]
    rewards: Float[Array, " B"] | Float[Array, "B T"]
    group_ids: Int[Array, " B"]
    truncated: Bool[Array, " B"] | None = None
    reference_logprobs: Float[Array, "B T"] | None = None
    proximal_logprobs: Float[Array, "B T"] | None = None
    values: Float[Array, "B T"] | None = None
    advantages: Float[Array, " B"] | Float[Array, "B T"] | None = None
    returns: Float[Array, "B T"] | None = None
    loss_weights: Float[Array, "B T"] | None = None
    trajectory_ids: Int[Array, " B"] | None = None
    turn_ids: Int[Array, "B T"] | None = None
    experts: Int[Array, "B T L k"] | None = None
    old: PolicyOutputs | None = None
    multipliers: Float[Array, "B T"] | None = None
    extras: dict[str, Array] | None = None
    memory: Any | None = None


class TokenSupport(NamedTuple):
    """The part of the distribution each token was drawn from that is looked at.

    Attributes:
      probabilities: of the K tokens looked at, out of the whole vocabulary: they sum to at most 1.
      ids: which tokens these are.
      chosen: where among them the drawn token is.
    """

    probabilities: Float[Array, "B T K"]
    ids: Int[Array, "B T K"]
    chosen: Int[Array, "B T"]


@pytree_dataclass
class PolicyOutputs(_Replaceable):
    """What the current policy says of a rollout's tokens; fields beyond `logprobs` only on request.

    Attributes:
      logprobs: log-probs of the rollout's tokens under the current parameters.
      entropy: exact entropy, in nats, of the distribution each token was drawn from.
      values: value estimates for the state in which each token is chosen.
      features: last hidden state before the unembedding.
      reference_logprobs: log-probs under the reference, where the rollout does not carry them.
      square_sum, cube_sum: `Σ_v p(v)²` and `Σ_v p(v)³` of that distribution.
      feature_square_norm: `‖h‖²` of the hidden state the distribution was computed from.
      score_features: gradient of the sequence's mean log-prob in those hidden states, see
        `logprobs.score_features`.
      support: the most likely tokens of that distribution, see `logprobs.token_support`.
    """

    logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None = None
    values: Float[Array, "B T"] | None = None
    features: Float[Array, "B T H"] | None = None
    reference_logprobs: Float[Array, "B T"] | None = None
    square_sum: Float[Array, "B T"] | None = None
    cube_sum: Float[Array, "B T"] | None = None
    feature_square_norm: Float[Array, "B T"] | None = None
    score_features: Float[Array, "B H"] | None = None
    support: TokenSupport | None = None


@pytree_dataclass
class Transition(_Replaceable):
    """Environment steps, time-major `[T, N, ...]`.

    `next_observation` is the observation *before* any automatic reset, so bootstrapping is right
    at every boundary; `terminated` ends the episode's return, `truncated` only its record.
    """

    observation: Any
    action: Any
    reward: Float[Array, "T N"]
    terminated: Bool[Array, "T N"]
    truncated: Bool[Array, "T N"]
    next_observation: Any
    log_prob: Float[Array, "T N"] | None = None
    value: Float[Array, "T N"] | None = None
