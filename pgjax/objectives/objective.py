"""`Objective`: advantage, mask, surrogate, aggregation and regularizers, put together.

`prepare` sees the whole batch once, outside any gradient; `loss` sees any minibatch of what
`prepare` returned, so minibatching and accumulation never split a group's statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks, aggregate, masks, segments
from pgjax.types import PolicyOutputs, Rollout

Diagnostics = dict[str, Float[Array, ""]]

ROLLOUT_NEEDS = ("reference_logprobs", "proximal_logprobs", "values")
OUTPUT_NEEDS = ("entropy", "values", "features")
NEEDS = frozenset(ROLLOUT_NEEDS + OUTPUT_NEEDS)
OLD_NEEDS = frozenset(
    {
        "cube_sum",
        "entropy",
        "feature_square_norm",
        "features",
        "score_features",
        "square_sum",
        "support",
    }
)


def _check_needs(needs: frozenset[str], known: frozenset[str] = NEEDS) -> None:
    unknown = needs - known
    if unknown:
        raise ValueError(f"needs: expected names among {sorted(known)}, got {sorted(unknown)}")


class Memory(NamedTuple):
    """What an objective keeps from batch to batch: a pytree of arrays, saved with the run.

    Attributes:
      init: `() -> memory`.
      update: `(memory, rollout) -> memory`, from a batch that `prepare` has filled; the parts of
        the objective see the memory before it as `rollout.memory`.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Rollout], Any]


def step_count() -> Memory:
    """A memory that counts batches: `rollout.memory` is int32, 0 at the first."""
    return Memory(init=lambda: jnp.int32(0), update=lambda memory, rollout: memory + 1)


@dataclasses.dataclass(frozen=True)
class Regularizer:
    """A per-token term added to the surrogate, before aggregation.

    Attributes:
      name: under which its mean value appears among the diagnostics.
      term: `(outputs, rollout) -> f32[B, T]`.
      coefficient: multiplies the term in the loss.
      needs: which optional fields it reads, see `Objective.needs`.
    """

    name: str
    term: Callable[[PolicyOutputs, Rollout], Float[Array, "B T"]]
    coefficient: float
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check_needs(self.needs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss for a trainer, as a frozen bundle of pure functions.

    Swap one part with `dataclasses.replace(objective, advantage=...)`.

    The parts are called in the order rewards, advantage, extras, mask, multiplier, targets; each
    sees what those before it made.

    Attributes:
      advantage: `rollout -> f32[B]` or `f32[B, T]`, from the whole batch.
      surrogate: `(outputs, rollout) -> f32[B, T]`, per-token loss; reads `rollout.advantages`.
      aggregate: `(values[B, T], mask[B, T]) -> f32[]`, linear in the values.
      mask: `rollout -> bool[B]` or `bool[B, T]`, which samples or tokens take part at all, from
        the whole batch; None keeps all.
      rewards: `rollout -> f32[B]`, reshaped rewards (penalties) that `advantage` and `mask` then
        see; None leaves them.
      targets: `rollout -> f32[B, T]`, value targets; None where no values are learnt.
      multiplier: `rollout -> f32[B]` or `f32[B, T]`, non-negative factors of the surrogate's
        loss, from the whole batch; None: 1.
      extras: `rollout -> {name: [B] or [B, T]}`, further numbers for the surrogate, which finds
        them in `rollout.extras`.
      memory: of an objective that looks back at earlier batches; None: none.
      regularizers: terms added to the surrogate.
      own_needs: optional fields that the parts above read, see `needs`.
      old_needs: optional fields of `rollout.old`, the policy's outputs before the first update,
        that the parts before the surrogate read.
      whole_groups: the surrogate compares samples of a group, so none may be split over
        minibatches.
    """

    advantage: Callable[[Rollout], Array]
    surrogate: Callable[[PolicyOutputs, Rollout], Float[Array, "B T"]]
    aggregate: Callable[..., Float[Array, ""]] = aggregate.token_mean
    mask: Callable[[Rollout], Array] | None = None
    rewards: Callable[[Rollout], Float[Array, " B"]] | None = None
    targets: Callable[[Rollout], Float[Array, "B T"]] | None = None
    multiplier: Callable[[Rollout], Array] | None = None
    extras: Callable[[Rollout], dict[str, Array]] | None = None
    memory: Memory | None = None
    regularizers: tuple[Regularizer, ...] = ()
    own_needs: frozenset[str] = frozenset()
    old_needs: frozenset[str] = frozenset()
    whole_groups: bool = False

    def __post_init__(self) -> None:
        _check_needs(self.own_needs)
        _check_needs(self.old_needs, OLD_NEEDS)

    @property
    def needs(self) -> frozenset[str]:
        """Optional fields that must be filled.

        `entropy`, `values`, `features` in `PolicyOutputs`; `reference_logprobs`,
        `proximal_logprobs` and (the old) `values` in `Rollout`.
        """
        return self.own_needs.union(*(r.needs for r in self.regularizers))

    def prepare(self, rollout: Rollout) -> Rollout:
        """Fills advantages (and value targets) and narrows the mask; whole batch, no gradient.

        Group ids are relabelled to consecutive integers, so any integers will do. A sample with a
        non-finite reward (its verifier failed) is kept out of every statistic and of the mask.

        Args:
          rollout: with whatever rollout fields `needs` names.

        Returns:
          the rollout with `advantages`, the final `mask`, dense `group_ids` and, where the
          objective has them, `returns`.

        Raises:
          ValueError: inconsistent shapes or dtypes, a needed field that is None, a batch of size 0.
        """
        return _without_old(self._prepared(rollout))

    def prepare_and_remember(self, rollout: Rollout) -> tuple[Rollout, Any]:
        """`prepare`, and the memory for the next batch: `rollout.memory`, brought up to date."""
        full = self._prepared(rollout)
        memory = None if self.memory is None else self.memory.update(full.memory, full)
        return _without_old(full), jax.lax.stop_gradient(memory)

    def _prepared(self, rollout: Rollout) -> Rollout:
        check_rollout(rollout)
        self._check_present("rollout", rollout, ROLLOUT_NEEDS)
        for name in sorted(self.old_needs):
            if rollout.old is None or getattr(rollout.old, name) is None:
                raise ValueError(f"rollout.old.{name}: this objective needs it, got None")
            for array in jax.tree.leaves(getattr(rollout.old, name)):
                if array.shape[:1] != rollout.tokens.shape[:1]:
                    raise ValueError(
                        f"rollout.old.{name}: expected {rollout.tokens.shape[0]} rows like tokens, "
                        f"got shape {array.shape}"
                    )
        rollout = jax.lax.stop_gradient(rollout)
        rollout = rollout.replace(group_ids=segments.dense_ids(rollout.group_ids))
        if self.memory is not None and rollout.memory is None:
            rollout = rollout.replace(memory=self.memory.init())
        # Rewards the user gave stay visible in the result; penalties only reach the statistics.
        given, mask = rollout.rewards, rollout.mask & masks.finite_rewards(rollout.rewards)[:, None]
        if self.rewards is not None:
            rollout = rollout.replace(rewards=self.rewards(rollout))
            mask = mask & masks.finite_rewards(rollout.rewards)[:, None]
        rollout = rollout.replace(advantages=self.advantage(rollout))
        if self.extras is not None:
            rollout = rollout.replace(extras={**(rollout.extras or {}), **self.extras(rollout)})
        if self.mask is not None:
            keep = self.mask(rollout)
            mask = mask & (keep[:, None] if keep.ndim == 1 else keep)
        if self.multiplier is not None:
            factors = self.multiplier(rollout)
            factors = factors[:, None] if factors.ndim == 1 else factors
            factors = jnp.broadcast_to(factors, mask.shape)
            rollout = rollout.replace(multipliers=factors)
        if self.targets is not None:
            rollout = rollout.replace(returns=self.targets(rollout))
        return jax.lax.stop_gradient(rollout.replace(mask=mask, rewards=given))

    def per_token(self, outputs: PolicyOutputs, rollout: Rollout) -> Float[Array, "B T"]:
        """Surrogate plus weighted regularizers, `f32[B, T]`, not yet aggregated."""
        if rollout.advantages is None:
            raise ValueError("rollout.advantages: got None; call prepare first")
        _checks.same_shape(mask=rollout.mask, logprobs=outputs.logprobs)
        self._check_present("outputs", outputs, OUTPUT_NEEDS)
        self._check_present("rollout", rollout, ROLLOUT_NEEDS)
        loss = self.surrogate(outputs, rollout)
        if rollout.multipliers is not None:
            loss = loss * rollout.multipliers
        for regularizer in self.regularizers:
            loss = loss + regularizer.coefficient * regularizer.term(outputs, rollout)
        return loss

    def value(self, outputs: PolicyOutputs, rollout: Rollout) -> Float[Array, ""]:
        """The loss alone: f32 scalar to minimise.

        With `rollout.loss_weights` (from `weigh` on a larger batch) the weighted sum over this
        part of that batch, so that parts add up exactly; otherwise `aggregate` over the mask.
        """
        losses = self.per_token(outputs, rollout)
        if rollout.loss_weights is not None:
            return aggregate.weighted_sum(losses, rollout.loss_weights)
        return self.aggregate(losses, rollout.mask)

    def weigh(self, rollout: Rollout) -> Rollout:
        """Fixes every token's weight in the loss by this batch's denominators.

        Any split of the result has losses, and so gradients, that sum to the whole batch's.
        """
        return rollout.replace(loss_weights=aggregate.weights(self.aggregate, rollout.mask))

    def loss(
        self, outputs: PolicyOutputs, rollout: Rollout
    ) -> tuple[Float[Array, ""], Diagnostics]:
        """Loss to minimise, and diagnostics, of any minibatch of a prepared rollout.

        Args:
          outputs: of the current policy on this minibatch; differentiable.
          rollout: (a slice of) what `prepare` returned.

        Returns:
          f32 scalar, and the dict of `diagnostics`. With an all-false mask the loss and its
          gradient are exactly 0.

        Raises:
          ValueError: `prepare` was not called, a needed field is None, unequal shapes.
        """
        return self.value(outputs, rollout), self.diagnostics(outputs, rollout)

    def diagnostics(self, outputs: PolicyOutputs, rollout: Rollout) -> Diagnostics:
        """What everybody wants to watch, as f32 scalars over the mask's tokens; no gradient.

        - `ratio_min`, `ratio_mean`, `ratio_max`: of policy to behaviour, per token.
        - `clip_fraction_low`, `clip_fraction_high`: share of tokens whose gradient the surrogate
          removed although their advantage is not 0, with ratio below or above 1. Measured on the
          surrogate's own gradient, so it holds for any surrogate, a user's included.
        - `approx_kl`: mean of `(r - 1) - log r`, an estimate of KL(behaviour ‖ policy) in nats.
        - `entropy`: exact where `outputs.entropy` is given, else the sample estimate -mean log π.
        - `effective_sample_size`: `(Σ r)² / (n Σ r²)` in (0, 1].
        - `groups_without_signal`: share of groups in which every advantage is 0.
        - `invalid_rewards`: share of samples whose reward is not finite.
        - `advantage_magnitude`: mean |advantage|.
        - the mean of each regularizer's term, by its name.
        """
        outputs, rollout = jax.lax.stop_gradient((outputs, rollout))
        mask = rollout.mask
        log_ratio = jnp.where(mask, outputs.logprobs - rollout.behavior_logprobs, 0.0)
        log_ratio = jnp.clip(log_ratio, -20.0, 20.0)
        ratio = jnp.exp(log_ratio)
        advantages = rollout.advantages
        assert advantages is not None
        if advantages.ndim == 1:
            advantages = advantages[:, None]
        advantages = jnp.where(mask, jnp.broadcast_to(advantages, mask.shape), 0.0)

        def surrogate_sum(logprobs: Array) -> Array:
            return self.surrogate(outputs.replace(logprobs=logprobs), rollout).sum()

        removed = (jax.grad(surrogate_sum)(outputs.logprobs) == 0) & (advantages != 0)
        mean = aggregate.masked_mean
        total = jnp.sum(jnp.where(mask, ratio, 0.0))
        total_square = jnp.sum(jnp.where(mask, ratio**2, 0.0))
        count = jnp.maximum(mask.sum(), 1)
        entropy = -outputs.logprobs if outputs.entropy is None else outputs.entropy
        result = {
            "ratio_min": aggregate.masked_min(ratio, mask),
            "ratio_mean": mean(ratio, mask),
            "ratio_max": aggregate.masked_max(ratio, mask),
            "clip_fraction_low": mean(jnp.where(removed & (ratio < 1), 1.0, 0.0), mask),
            "clip_fraction_high": mean(jnp.where(removed & (ratio > 1), 1.0, 0.0), mask),
            "approx_kl": mean(ratio - 1 - log_ratio, mask),
            "entropy": mean(entropy, mask),
            "effective_sample_size": total**2 / jnp.maximum(total_square * count, 1e-30),
            "groups_without_signal": groups_without_signal(rollout),
            "invalid_rewards": jnp.mean(1.0 - masks.finite_rewards(rollout.rewards)),
            "advantage_magnitude": mean(jnp.abs(advantages), mask),
        }
        for regularizer in self.regularizers:
            result[regularizer.name] = mean(regularizer.term(outputs, rollout), mask)
        return {name: jnp.asarray(x, jnp.float32) for name, x in result.items()}

    def _check_present(self, owner: str, tree: Any, fields: tuple[str, ...]) -> None:
        for name in fields:
            if name in self.needs and getattr(tree, name) is None:
                raise ValueError(f"{owner}.{name}: this objective needs it, got None")


def groups_without_signal(rollout: Rollout) -> Float[Array, ""]:
    """Share of a prepared rollout's groups in which every advantage (0 off the mask) is 0."""
    advantages = rollout.advantages
    assert advantages is not None
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    strength = jnp.max(jnp.where(rollout.mask, jnp.abs(advantages), 0.0), axis=-1)
    ids, size = segments.dense_ids(rollout.group_ids), strength.shape[0]
    strongest = segments.maximum(strength, ids, num_segments=size)
    present = segments.count(ids, num_segments=size) > 0
    return jnp.sum(present & (strongest == 0)) / jnp.sum(present)


def _without_old(rollout: Rollout) -> Rollout:
    """What minibatches need: neither the memory nor the old policy's outputs."""
    return rollout.replace(old=None, memory=None)


def check_rollout(rollout: Rollout) -> None:
    """Raises ValueError, naming the field, where shapes or dtypes are not a rollout's.

    Of what the arrays hold nothing is looked at.
    """
    if not isinstance(rollout, Rollout):
        raise ValueError(f"rollout: expected a pgjax.Rollout, got {type(rollout).__name__}")
    apart = ("old", "extras", "memory")
    names = [f.name for f in dataclasses.fields(rollout) if f.name not in apart]
    fields = {name: getattr(rollout, name) for name in names}
    required = ("tokens", "mask", "behavior_logprobs", "rewards", "group_ids")
    given = {n: x for n, x in fields.items() if x is not None or n in required}
    given |= {f"extras[{name!r}]": x for name, x in (rollout.extras or {}).items()}
    for name, array in given.items():
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise ValueError(f"{name}: expected an array, got {type(array).__name__}")
    _checks.rank("tokens", rollout.tokens, 2)
    batch, length = shape = rollout.tokens.shape
    if batch == 0 or length == 0:
        raise ValueError(
            f"tokens: expected at least one sequence of at least one token, got shape {shape}"
        )
    for name in ("tokens", "group_ids", "trajectory_ids", "turn_ids", "experts"):
        _checks.integer(**{name: fields[name]})
    _checks.boolean(mask=rollout.mask, truncated=rollout.truncated)
    logprobs = ("behavior_logprobs", "reference_logprobs", "proximal_logprobs")
    per_token = (*logprobs, "values", "returns", "loss_weights", "multipliers")
    for name in ("rewards", "advantages", *per_token):
        _checks.floating(**{name: fields[name]})
    _checks.same_shape(**{n: fields[n] for n in ("tokens", "mask", "turn_ids", *per_token)})
    for name, array in given.items():
        if name.startswith("extras") and array.shape not in ((batch,), shape):
            raise ValueError(f"{name}: expected shape {(batch,)} or {shape}, got {array.shape}")
        if array.shape[:1] != (batch,):
            raise ValueError(f"{name}: expected {batch} rows like tokens, got shape {array.shape}")
        if array.shape[1:] and array.shape[1] != length:
            raise ValueError(
                f"{name}: expected {length} columns like tokens, got shape {array.shape}"
            )
        if name in ("group_ids", "truncated", "trajectory_ids"):
            _checks.rank(name, array, 1)
        elif name in ("rewards", "advantages"):
            _checks.rank(name, array, 1, 2)
        elif name == "experts":
            _checks.rank(name, array, 4)
