"""One training step: prepare the batch, then minibatches, epochs and gradient accumulation.

The accumulated gradient equals the full minibatch's: every token's weight in the loss is fixed by
the minibatch's own (global) denominators before it is cut into microbatches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pgjax.aggregate import masked_mean
from pgjax.objectives import Objective
from pgjax.objectives.objective import check_rollout, groups_without_signal
from pgjax.train.outputs import OutputsFunction
from pgjax.train.partial import combine
from pgjax.train.state import TrainState
from pgjax.types import PolicyOutputs, Rollout

Metrics = dict[str, Float[Array, ""]]
Update = Callable[..., tuple[TrainState, Metrics]]

_LOGPROBS_ONLY: frozenset[str] = frozenset()


def _split(tree: Any, parts: int, unit: int = 1) -> Any:
    """Every array `[B, ...]` as `[parts, B // parts, ...]`; unit i of rows in part i mod parts.

    Taking every `parts`-th unit, not consecutive ones, keeps each part spread over the devices of a
    batch that is sharded along its rows.
    """

    def split(x: Array) -> Array:
        units = x.reshape(x.shape[0] // (parts * unit), parts, unit, *x.shape[1:])
        return units.swapaxes(0, 1).reshape(parts, x.shape[0] // parts, *x.shape[1:])

    return jax.tree.map(split, tree)


def _join(tree: Any, unit: int = 1) -> Any:
    """The inverse of `_split`."""

    def join(x: Array) -> Array:
        parts, rows = x.shape[:2]
        units = x.reshape(parts, rows // unit, unit, *x.shape[2:])
        return units.swapaxes(0, 1).reshape(parts * rows, *x.shape[2:])

    return jax.tree.map(join, tree)


def _rows_of(units: Array, unit: int) -> Array:
    """The rows of units of consecutive rows, in order."""
    return (units[:, None] * unit + jnp.arange(unit)).reshape(-1)


def _trimmed(tree: Any, length: int, width: int) -> Any:
    """Every array `[b, T]` cut to its first `width` columns; others as they are."""
    return jax.tree.map(lambda x: x[:, :width] if x.ndim > 1 and x.shape[1] == length else x, tree)


def _padded(tree: Any, length: int) -> Any:
    """The inverse of `_trimmed` for outputs that are 0 beyond the cut."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1]))), tree)


def _in_parts(function: Callable[[Rollout], Any], rollout: Rollout, parts: int) -> Any:
    if parts == 1:
        return function(rollout)
    return _join(jax.lax.map(function, _split(rollout, parts)))


def make_update(
    outputs: OutputsFunction,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_epochs: int = 1,
    num_minibatches: int = 1,
    num_microbatches: int = 1,
    widths: Sequence[int] = (),
    group_size: int | None = None,
    measure_updates: bool = False,
    state_shardings: TrainState | None = None,
) -> Update:
    """A jitted `update(state, rollout, reference_params=None, frozen=None) -> (state, metrics)`.

    The state is donated. Where parameters are `frozen`, the state's are those trained, and
    `outputs` sees `train.combine` of the two: an adapter attached to its frozen matrix, say. What
    is frozen has no gradient and no optimizer state, and is neither donated nor part of a
    checkpoint; it may serve as `reference_params` too where adapters are all that is trained.

    Per call: rollout fields that the objective needs and the rollout lacks
    (`reference_logprobs`, `proximal_logprobs`, old `values`, `old`) are computed;
    `objective.prepare`, which brings the state's `memory` up to date for the next call; then
    `num_epochs` passes over `num_minibatches` shuffled minibatches, one optimizer step each, whose
    gradient is accumulated over `num_microbatches`.

    A step whose loss or gradient norm is not finite is skipped: parameters and optimizer state stay
    what they were, to the bit, and the next minibatch goes on from there. So does the memory where
    the batch would put a number into it that is not finite. `state.step` counts all the same. See
    `train.keep_skipped` for what to do about such batches.

    Args:
      outputs: `(params, rollout, needs) -> PolicyOutputs`, of whole parameters.
      objective: any `pgjax.Objective`.
      optimizer: any Optax transformation; put `optax.clip_by_global_norm` into its chain to clip.
      num_epochs: passes over the batch.
      num_minibatches: optimizer steps a pass.
      num_microbatches: parts of a minibatch that are in memory one after the other.
      widths: row lengths, in tokens, below the full one at which the update is also compiled. Rows
        are then sorted by length before they are cut into microbatches, and each microbatch runs
        at the smallest width that holds its longest row, without compiling again: padding costs
        less. The result is the same.
      group_size: rows of a group, all of which lie next to each other; groups then stay whole
        when the batch is shuffled and cut. None: rows are on their own.
      measure_updates: adds the metric `update_norm`, and skips steps at which it is not finite as
        well: those of an optimizer whose own arithmetic fails. Both states are then held at once
        (2.6 times the parameters' memory more for AdamW, and half of its speed on a CPU), since
        the norm is known only when all of the new one is.
      state_shardings: where the new state is to lie, from `train.shardings(state)`; None leaves it
        to the compiler, which may choose another layout than the old state's and so compile again
        at the second call.

    Returns:
      the update. Its metrics are f32 scalars: the objective's diagnostics (means over the optimizer
      steps; min and max of extremes), `loss`, `gradient_norm` (before the optimizer),
      `skipped_updates` (how many optimizer steps of this call were skipped; what is measured on
      those is as it came out, NaN mostly), and of the batch `reward`, `reward_std`,
      `completion_length`, `truncated`.

    Raises:
      ValueError: counts below 1, or an objective that compares samples of a group in a batch that
        is cut without `group_size`, here; at trace time, a field of the rollout of a wrong shape or
        dtype, a batch size that the counts do not divide, a needed reference policy that was not
        given, a state without the memory that the objective needs.
    """
    for name, value in {
        "num_epochs": num_epochs,
        "num_minibatches": num_minibatches,
        "num_microbatches": num_microbatches,
    }.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if any(w < 1 for w in widths):
        raise ValueError(f"widths: expected numbers of at least 1, got {tuple(widths)}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size: expected at least 1, got {group_size}")
    if objective.whole_groups and group_size is None and num_minibatches * num_microbatches > 1:
        raise ValueError(
            "group_size: this objective compares samples of a group, so a batch that is cut into "
            f"{num_minibatches} minibatches of {num_microbatches} parts needs it, got None"
        )
    unit = group_size or 1
    needs = objective.needs

    def fill(
        policy: OutputsFunction, params: Any, rollout: Rollout, reference_params: Any | None
    ) -> Rollout:
        """Computes the rollout fields that the objective needs and the rollout lacks."""
        parts = num_minibatches * num_microbatches
        changes: dict[str, Any] = {}
        if "reference_logprobs" in needs and rollout.reference_logprobs is None:
            if reference_params is None:
                raise ValueError(
                    "reference_params: this objective needs a reference policy, got None"
                )
            changes["reference_logprobs"] = _in_parts(
                lambda r: outputs(reference_params, r, _LOGPROBS_ONLY).logprobs, rollout, parts
            )
        wanted = {
            name: field
            for name, field in (("proximal_logprobs", "logprobs"), ("values", "values"))
            if name in needs and getattr(rollout, name) is None
        }
        if wanted:
            extra = frozenset({"values"}) if "values" in wanted else _LOGPROBS_ONLY
            old = _in_parts(lambda r: policy(params, r, extra), rollout, parts)
            changes |= {name: getattr(old, field) for name, field in wanted.items()}
        if objective.old_needs and rollout.old is None:
            changes["old"] = _in_parts(
                lambda r: policy(params, r, objective.old_needs), rollout, parts
            )
        return rollout.replace(**jax.lax.stop_gradient(changes))

    def gradient(
        policy: OutputsFunction, params: Any, minibatch: Rollout
    ) -> tuple[Any, Array, PolicyOutputs]:
        minibatch = objective.weigh(minibatch)

        def loss(params: Any, part: Rollout) -> tuple[Array, PolicyOutputs]:
            out = policy(params, part, needs)
            return objective.value(out, part), jax.lax.stop_gradient(out).replace(features=None)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        batch, length = minibatch.mask.shape
        ladder = sorted({w for w in widths if w < length})

        def at_width(width: int) -> Callable[[Any, Rollout], Any]:
            def run(params: Any, part: Rollout) -> Any:
                (value, out), grads = value_and_grad(params, _trimmed(part, length, width))
                return (value, _padded(out, length)), grads

            return run

        def one(params: Any, part: Rollout) -> Any:
            if not ladder:
                return value_and_grad(params, part)
            # Nothing behind a row's last chosen token has any bearing on its loss.
            longest = jnp.max(jnp.where(part.mask, jnp.arange(1, length + 1), 0))
            rung = jnp.sum(longest > jnp.array(ladder))
            return jax.lax.switch(rung, [at_width(w) for w in [*ladder, length]], params, part)

        if num_microbatches == 1:
            (value, out), grads = one(params, minibatch)
            return grads, value, out

        def accumulate(carry: tuple[Any, Array], part: Rollout) -> tuple[Any, PolicyOutputs]:
            total, value = carry
            (part_value, out), grads = one(params, part)
            return (jax.tree.map(jnp.add, total, grads), value + part_value), out

        zero = (jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
        if not ladder:
            parts = _split(minibatch, num_microbatches, unit)
            (grads, value), out = jax.lax.scan(accumulate, zero, parts)
            return grads, value, _join(out, unit)
        ends = jnp.max(jnp.where(minibatch.mask, jnp.arange(1, length + 1), 0), axis=1)
        order = _rows_of(jnp.argsort(ends.reshape(-1, unit).max(1)), unit)
        parts = jax.tree.map(
            lambda x: x[order].reshape(num_microbatches, -1, *x.shape[1:]), minibatch
        )
        (grads, value), out = jax.lax.scan(accumulate, zero, parts)
        unsorted = jnp.argsort(order)
        out = jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:])[unsorted], out)
        return grads, value, out

    def optimizer_step(
        policy: OutputsFunction, carry: tuple[Any, optax.OptState], minibatch: Rollout
    ) -> tuple[tuple[Any, optax.OptState], Metrics]:
        grads, value, out = gradient(policy, carry[0], minibatch)
        metrics = _diagnostics(objective, out, minibatch)
        metrics |= {"loss": value, "gradient_norm": optax.tree.norm(grads)}
        finite = jnp.isfinite(value) & jnp.isfinite(metrics["gradient_norm"])

        def apply(grads: Any, carry: Any) -> tuple[Any, Any]:
            params, opt_state = carry
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return updates, (optax.apply_updates(params, updates), opt_state)

        if measure_updates:
            updates, new = apply(grads, carry)
            metrics["update_norm"] = optax.tree.norm(updates)
            finite &= jnp.isfinite(metrics["update_norm"])
            carry = _either(finite, new, carry)
        else:  # a branch writes over the old state, a choice has to hold both
            carry = _branch(finite, lambda *given: apply(*given)[1], grads, carry)
        return carry, metrics | {"skipped_updates": 1.0 - finite.astype(jnp.float32)}

    def update(
        state: TrainState,
        rollout: Rollout,
        reference_params: Any | None = None,
        frozen: Any | None = None,
    ) -> tuple[TrainState, Metrics]:
        def policy(params: Any, rollout: Rollout, needs: frozenset[str]) -> PolicyOutputs:
            return outputs(combine(params, frozen), rollout, needs)

        check_rollout(rollout)
        step = functools.partial(optimizer_step, policy)
        batch = rollout.tokens.shape[0]
        if batch % (num_minibatches * num_microbatches * unit):
            raise ValueError(
                f"rollout: {batch} sequences cannot be cut into num_minibatches={num_minibatches} "
                f"times num_microbatches={num_microbatches} equal parts"
                + (f" of whole groups of {unit}" if unit > 1 else "")
            )
        if objective.memory is not None and state.memory is None:
            raise ValueError(
                "state.memory: this objective has a memory, got None; make the state with "
                "train.init(..., objective=objective)"
            )
        rollout = fill(policy, state.params, rollout, reference_params)
        batch_metrics = _batch_metrics(rollout)
        prepared, memory = objective.prepare_and_remember(rollout.replace(memory=state.memory))
        if objective.memory is not None:
            memory = _either(_stays_finite(memory, state.memory), memory, state.memory)
        carry = (state.params, state.opt_state)
        if num_epochs == num_minibatches == 1:
            carry, metrics = step(carry, prepared)
        else:
            key = jax.random.fold_in(state.key, state.step)

            def epoch(carry: Any, key: Array) -> tuple[Any, Metrics]:
                order = _rows_of(jax.random.permutation(key, batch // unit), unit)
                shuffled = jax.tree.map(lambda x: x[order], prepared)
                return jax.lax.scan(step, carry, _split(shuffled, num_minibatches, unit))

            carry, stacked = jax.lax.scan(epoch, carry, jax.random.split(key, num_epochs))
            metrics = {name: _REDUCE.get(name, jnp.mean)(x) for name, x in stacked.items()}
        params, opt_state = carry
        state = state.replace(
            params=params, opt_state=opt_state, step=state.step + 1, memory=memory
        )
        # A group may be spread over minibatches: its signal is a fact of the whole batch.
        whole = {"groups_without_signal": groups_without_signal(prepared)}
        return state, batch_metrics | metrics | whole

    if state_shardings is None:
        return jax.jit(update, donate_argnums=0)
    return jax.jit(update, donate_argnums=0, out_shardings=(state_shardings, None))


_REDUCE: dict[str, Callable[[Array], Array]] = {
    "ratio_min": jnp.min,
    "ratio_max": jnp.max,
    "skipped_updates": jnp.sum,
}


def _like(old: Any, new: Any) -> Any:
    """`old` in the dtypes of `new`."""

    def convert(old: Any, new: Any) -> Any:
        if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
            return old
        return jnp.asarray(old, new.dtype)

    return jax.tree.map(convert, old, new)


def _either(condition: Array, new: Any, old: Any) -> Any:
    """`new` where the scalar condition holds, else `old`, in the dtypes of `new`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, _like(old, new))


def _branch(condition: Array, step: Callable[[Any, Any], Any], grads: Any, old: Any) -> Any:
    """`step(grads, old)` where the scalar condition holds, else `old`; only that is computed."""
    new = jax.eval_shape(step, grads, old)
    return jax.lax.cond(condition, step, lambda _, old: _like(old, new), grads, old)


def _stays_finite(new: Any, old: Any) -> Array:
    """False where a number that was finite is not any more."""

    def stays(new: Any, old: Any) -> Array:
        if not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
            return jnp.array(True)
        return jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))

    return jnp.array(jax.tree.leaves(jax.tree.map(stays, new, old))).all()


def _diagnostics(objective: Objective, out: PolicyOutputs, minibatch: Rollout) -> Metrics:
    if "features" in objective.needs:  # not kept across microbatches: [B, T, H]
        return {}
    return objective.diagnostics(out, minibatch)


def _batch_metrics(rollout: Rollout) -> Metrics:
    rewards = rollout.rewards
    if rewards.ndim == 2:
        rewards = jnp.where(rollout.mask, rewards, 0.0).sum(-1)
    finite = jnp.isfinite(rewards)
    mean = masked_mean(rewards, finite)
    variance = masked_mean(jnp.square(rewards - mean), finite)
    metrics = {
        "reward": mean,
        "reward_std": jnp.sqrt(variance),
        "completion_length": rollout.mask.sum(-1).mean(),
    }
    if rollout.truncated is not None:
        metrics["truncated"] = rollout.truncated.mean()
    return {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}
