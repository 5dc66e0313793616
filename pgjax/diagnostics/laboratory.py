"""What an estimator does in expectation and how much it scatters, for any objective.

A batch of a `TokenProblem` is G samples of each of its prompts. Where all batches can be enumerated
every number is exact; elsewhere it is estimated with control variates and comes with an interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.diagnostics import lab_batches, lab_gradients, problems
from pgjax.objectives import Objective
from pgjax.types import pytree_dataclass

MAX_BATCHES = 200_000
ROUNDING = 256  # units in the last place that long sums may be off
CHUNK = 512  # batches whose gradients are computed side by side
NORMAL_95, NORMAL_975 = 1.6448536269514722, 1.959963984540054


class Estimate(NamedTuple):
    """A number and its 95% interval; both ends are the number itself where it is exact."""

    value: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]


@pytree_dataclass
class Comparison:
    """An expected direction `g` beside the true gradient `t`.

    Attributes:
      gradient: g, a pytree like the parameters.
      radius: the expectation lies within this distance of `gradient` with 95% confidence; all
        intervals follow from it, so they hold together. 0 where exact.
      bias_norm: `‖g - t‖`.
      norm_ratio: `‖g‖ / ‖t‖`; 0 where t is 0.
      cosine: of the angle between g and t; 0 where either is 0.
      scale: the multiple of t that is nearest to g, `⟨g, t⟩ / ‖t‖²`; 0 where t is 0.
      residual: the share of g off that multiple, `‖g - scale t‖ / ‖g‖`: 0 for whatever goes
        along (or against) the true gradient, at any speed. 0 where g is 0.
    """

    gradient: Any
    radius: Float[Array, ""]
    bias_norm: Estimate
    norm_ratio: Estimate
    cosine: Estimate
    scale: Estimate
    residual: Estimate


@pytree_dataclass
class EstimatorReport:
    """What an estimator is worth at one policy; arrays in the parameters' dtype.

    Attributes:
      true_gradient: `∇J` at the current policy, exact; a pytree like the parameters.
      expected: the expected ascent direction `E[-∇ loss]`, compared with it.
      clipped: the same after each batch's gradient is clipped to the norm `clip_norm`.
      covariance: of the ascent direction from batch to batch, over flattened parameters `[D, D]`.
      variance: its trace.
      signal_to_noise: `‖E g‖² / variance`; infinite without noise, 0 without either.
      clip_norm: see `clipped`.
      num_batches: that were summed over, or drawn.
      exact: every batch was summed over.
    """

    true_gradient: Any
    expected: Comparison
    clipped: Comparison
    covariance: Float[Array, "D D"]
    variance: Estimate
    signal_to_noise: Estimate
    clip_norm: Float[Array, ""]
    num_batches: Int[Array, ""]
    exact: Bool[Array, ""]

    def table(self) -> list[dict[str, Any]]:
        """The numbers as rows with `quantity`, `value` and, unless exact, `low` and `high`."""
        clip = f"clipped to norm {float(self.clip_norm):g}"
        numbers = {
            "bias, norm": self.expected.bias_norm,
            "norm / true norm": self.expected.norm_ratio,
            "cosine to true": self.expected.cosine,
            "best multiple of true": self.expected.scale,
            "residual off it, share": self.expected.residual,
            "variance, trace": self.variance,
            "signal / noise": self.signal_to_noise,
            f"{clip}: cosine": self.clipped.cosine,
            f"{clip}: norm / true norm": self.clipped.norm_ratio,
        }
        rows = []
        for quantity, number in numbers.items():
            row: dict[str, Any] = {"quantity": quantity, "value": float(number.value)}
            if not self.exact:
                row |= {"low": float(number.low), "high": float(number.high)}
            rows.append(row)
        return rows


def estimator_report(
    objective: Objective,
    problem: problems.TokenProblem,
    params: Any,
    *,
    group_size: int,
    behavior_params: Any | None = None,
    old_params: Any | None = None,
    reference_params: Any | None = None,
    memory: Any | None = None,
    exchangeable: bool = False,
    max_batches: int = MAX_BATCHES,
    samples: int = 20_000,
    key: PRNGKeyArray | None = None,
    clip_norm: float = 1.0,
) -> EstimatorReport:
    """Bias, variance and signal-to-noise of any objective's gradient on any enumerable problem.

    `E[-∇ loss] = Σ_batches p(batch) (-∇ loss(batch))`, with p that of the behaviour policy, beside
    `∇J` of `problems.expected_reward` at the current one. A rollout is filled as a trainer does:
    `old` with what the objective's `old_needs` name and `proximal_logprobs` from the old policy,
    `reference_logprobs` from the reference, `memory`; values are 0.

    With more than `max_batches` batches, `samples` of them are drawn and the expectation is their
    mean, with everything regressed out that they share with functions of known expectation (see
    `lab_gradients.controls`).

    Works under `jit` and `vmap` over parameters, keys and whatever the problem closes over. In
    float32 expect six digits; under x64 with float64 parameters fifteen.

    Args:
      objective: any `Objective`.
      problem: with finite rewards and at most 200,000 sequences.
      params: of the current policy, in which the gradient is taken; any pytree of one float dtype.
      group_size: G ≥ 1 samples per prompt.
      behavior_params: of the policy that samples; default: the current one (on-policy).
      old_params: of the learner before the first update on the batch, where that is not quite the
        sampler; default: the behaviour's.
      reference_params: of the frozen reference; default: the behaviour's.
      memory: of an objective that has one; default: its initial one.
      exchangeable: the samples of a prompt may change places without any change of the gradient.
        Then one order of each group stands for all. True of statistics by group; not where ties
        are broken by order, or pairs formed by it. Nothing checks it.
      max_batches: up to which all are summed over.
      samples: drawn where there are more; at least 6 D + 2 for D parameters.
      key: for drawing; needed only where there are more.
      clip_norm: > 0.

    Returns:
      an `EstimatorReport`.

    Raises:
      ValueError: counts out of range, rewards that are not finite, too many batches and no key.
    """
    _checks.in_range("group_size", group_size, 1)
    _checks.in_range("max_batches", max_batches, 0)
    _checks.in_range("clip_norm", clip_norm, 0.0, low_open=True)
    behavior = params if behavior_params is None else behavior_params
    policies = lab_gradients.Policies(
        current=params,
        behavior=behavior,
        old=behavior if old_params is None else old_params,
        reference=behavior if reference_params is None else reference_params,
    )
    with jax.ensure_compile_time_eval():  # who draws which token depends on no parameter
        rows = problems.all_sequences(problem)
        rewards = problem.reward(jnp.asarray(rows))
        if _checks.is_concrete(rewards) and not np.all(np.isfinite(rewards)):
            raise ValueError("problem: expected finite rewards, got some that are not")
    sizes = lab_batches.sequences_per_prompt(rows, problem.num_prompts)
    total = lab_batches.count(sizes, group_size, exchangeable=exchangeable)
    if objective.memory is not None and memory is None:
        memory = objective.memory.init()

    if total <= max_batches:
        batches = lab_batches.enumerate_batches(sizes, group_size, exchangeable=exchangeable)

        @jax.jit
        def enumerated(policies: lab_gradients.Policies, memory: Any, batches: Any) -> Any:
            true = _true_gradient(problem, policies.current)
            found = _all_gradients(objective, problem, policies, memory, rows, batches)
            return _exact_report(policies.current, true, *found, clip_norm)

        return enumerated(policies, memory, batches)

    num_params = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
    if key is None:
        raise ValueError(
            f"key: {total} batches are more than max_batches={max_batches}, so some are drawn and "
            "a key is needed, got None"
        )
    _checks.in_range("samples", samples, 6 * num_params + 2)

    @jax.jit
    def drawn(policies: lab_gradients.Policies, memory: Any, key: PRNGKeyArray) -> Any:
        true = _true_gradient(problem, policies.current)
        found = _drawn_gradients(objective, problem, policies, memory, key, group_size, samples)
        return _sampled_report(policies.current, true, *found, clip_norm)

    return drawn(policies, memory, key)


def _true_gradient(problem: problems.TokenProblem, params: Any) -> Array:
    with jax.ensure_compile_time_eval():
        gradient = jax.grad(lambda p: problems.expected_reward(problem, p))(params)
        largest = jnp.max(jnp.abs(problem.reward(jnp.asarray(problems.all_sequences(problem)))))
    return _without_rounding(ravel_pytree(gradient)[0], largest)


def _without_rounding(vector: Float[Array, " D"], terms: Float[Array, ""]) -> Float[Array, " D"]:
    """0 for a sum of terms of that size whose length is rounding: it has no direction."""
    least = ROUNDING * jnp.finfo(vector.dtype).eps * terms
    return jnp.where(jnp.linalg.norm(vector) <= least, 0.0, vector)  # NaN stays visible


def _all_gradients(
    objective: Objective,
    problem: problems.TokenProblem,
    policies: lab_gradients.Policies,
    memory: Any,
    rows: Int[np.ndarray, "S T"],
    batches: tuple[Int[Array, "N B"], Float[Array, " N"]],
) -> tuple[Float[Array, "N D"], Float[Array, " N"]]:
    """Every batch's ascent direction, and its probability."""
    tokens = jnp.asarray(rows)
    table = lab_gradients.filled_rollout(objective, problem, policies, tokens)
    log_probability = problems.log_probability(problem, policies.behavior, tokens)
    indices, log_counts = batches

    def one(index: Array) -> Array:
        rollout = jax.tree.map(lambda x: x[index], table).replace(memory=memory)
        return lab_gradients.ascent(objective, problem, policies.current, rollout)

    gradients = _in_chunks(one, indices)
    weights = jnp.exp(log_probability[indices].sum(-1) + log_counts).astype(gradients.dtype)
    return jnp.where(weights[:, None] > 0, gradients, 0.0), weights


def _drawn_gradients(
    objective: Objective,
    problem: problems.TokenProblem,
    policies: lab_gradients.Policies,
    memory: Any,
    key: PRNGKeyArray,
    group_size: int,
    samples: int,
) -> tuple[Float[Array, "N D"], Float[Array, "N E"]]:
    """Some batches' ascent directions and controls."""
    of = lab_gradients.controls(
        problem, policies.behavior, _true_gradient(problem, policies.behavior)
    )

    def one(key: PRNGKeyArray) -> tuple[Array, Array]:
        tokens = problems.sample(problem, policies.behavior, key, group_size=group_size).tokens
        rollout = lab_gradients.filled_rollout(objective, problem, policies, tokens)
        rollout = rollout.replace(memory=memory)
        return lab_gradients.ascent(objective, problem, policies.current, rollout), of(rollout)

    return _in_chunks(one, jax.random.split(key, samples))


def _in_chunks(function: Callable[[Array], Any], rows: Array) -> Any:
    """`function` of each row, `CHUNK` side by side; the last chunk is filled up, so that the
    function is compiled once."""
    size = min(CHUNK, rows.shape[0])
    chunks = -(-rows.shape[0] // size)
    filled = jnp.resize(rows, (chunks * size, *rows.shape[1:]))
    results = jax.lax.map(jax.vmap(function), filled.reshape(chunks, size, *rows.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: rows.shape[0]], results)


def _clip(gradients: Float[Array, "N D"], norm: float) -> Float[Array, "N D"]:
    norms = jnp.linalg.norm(gradients, axis=-1, keepdims=True)
    return gradients * jnp.where(norms > norm, norm / jnp.where(norms > 0, norms, 1.0), 1.0)


def _exact_report(
    params: Any, true: Array, gradients: Array, weights: Array, clip_norm: float
) -> EstimatorReport:
    size = jnp.sqrt(weights @ jnp.sum(gradients**2, axis=-1))
    mean = _without_rounding(weights @ gradients, size)
    deviations = gradients - mean
    covariance = (weights[:, None] * deviations).T @ deviations
    variance = jnp.trace(covariance)
    ratio = _signal_to_noise(jnp.sum(mean**2), variance)
    zero = jnp.zeros((), mean.dtype)
    clipped = _without_rounding(weights @ _clip(gradients, clip_norm), size)
    return EstimatorReport(
        true_gradient=_unflatten(params, true),
        expected=_compare(params, mean, true, zero),
        clipped=_compare(params, clipped, true, zero),
        covariance=covariance,
        variance=Estimate(variance, variance, variance),
        signal_to_noise=Estimate(ratio, ratio, ratio),
        clip_norm=jnp.asarray(clip_norm, mean.dtype),
        num_batches=jnp.asarray(gradients.shape[0]),
        exact=jnp.asarray(True),
    )


def _sampled_report(
    params: Any, true: Array, gradients: Array, controls: Array, clip_norm: float
) -> EstimatorReport:
    count = gradients.shape[0]
    mean, noise = _controlled_mean(gradients, controls)
    clipped, clipped_noise = _controlled_mean(_clip(gradients, clip_norm), controls)
    deviations = gradients - gradients.mean(0)
    covariance = deviations.T @ deviations / (count - 1)
    square = jnp.sum(deviations**2, axis=-1)
    variance = jnp.trace(covariance)
    margin = NORMAL_975 * jnp.std(square, ddof=1) / count**0.5
    spread = Estimate(variance, jnp.maximum(variance - margin, 0.0), variance + margin)
    # Where nothing is left to chance, rounding still is.
    size = jnp.sqrt(jnp.mean(jnp.sum(gradients**2, axis=-1)))
    rounding = ROUNDING * jnp.finfo(mean.dtype).eps * size
    radius, length = _radius(noise) + rounding, jnp.linalg.norm(mean)
    ratio = Estimate(
        _signal_to_noise(jnp.maximum(length**2 - jnp.trace(noise), 0.0), variance),
        _signal_to_noise(jnp.maximum(length - radius, 0.0) ** 2, spread.high),
        _signal_to_noise((length + radius) ** 2, spread.low),
    )
    return EstimatorReport(
        true_gradient=_unflatten(params, true),
        expected=_compare(params, mean, true, radius),
        clipped=_compare(params, clipped, true, _radius(clipped_noise) + rounding),
        covariance=covariance,
        variance=spread,
        signal_to_noise=ratio,
        clip_norm=jnp.asarray(clip_norm, mean.dtype),
        num_batches=jnp.asarray(count),
        exact=jnp.asarray(False),
    )


def _controlled_mean(
    values: Float[Array, "N D"], controls: Float[Array, "N E"]
) -> tuple[Float[Array, " D"], Float[Array, "D D"]]:
    """Mean of the values at controls of 0 by least squares, and the covariance of that estimate."""
    count = values.shape[0]
    center, middle = values.mean(0), controls.mean(0)
    left, singular, right = jnp.linalg.svd(controls - middle, full_matrices=False)
    floor = singular[0] * max(controls.shape) * jnp.finfo(values.dtype).eps
    kept = singular > floor
    inverse = jnp.where(kept, 1.0 / jnp.where(kept, singular, 1.0), 0.0)
    projections = jnp.where(kept[:, None], left.T @ (values - center), 0.0)
    shift = middle @ (right.T @ (inverse[:, None] * projections))
    rest = values - center - left @ projections
    freedom = count - 1 - jnp.sum(kept)
    # The controls' own mean is not quite 0: the fitted plane is less certain there.
    leverage = jnp.sum((inverse * (right @ middle)) ** 2)
    return center - shift, rest.T @ rest / freedom * (1 / count + leverage)


def _radius(covariance: Float[Array, "D D"]) -> Float[Array, ""]:
    """95% quantile of the length of Gaussian noise, by the χ² of its first two moments."""
    mean, square = jnp.trace(covariance), jnp.sum(covariance**2)
    safe = mean > 0
    mean, square = jnp.where(safe, mean, 1.0), jnp.where(safe, square, 1.0)
    freedom = mean**2 / square
    cube = 2 / (9 * freedom)  # the quantile of a χ² by Wilson and Hilferty
    return jnp.where(safe, jnp.sqrt(mean * (1 - cube + NORMAL_95 * jnp.sqrt(cube)) ** 3), 0.0)


def _signal_to_noise(signal: Array, noise: Array) -> Array:
    quiet = noise <= 0
    ratio = signal / jnp.where(quiet, 1.0, noise)
    return jnp.where(quiet, jnp.where(signal > 0, jnp.inf, 0.0), ratio)


def _unflatten(params: Any, vector: Float[Array, " D"]) -> Any:
    return ravel_pytree(params)[1](vector)


def _compare(params: Any, mean: Array, true: Array, radius: Array) -> Comparison:
    length, true_length = jnp.linalg.norm(mean), jnp.linalg.norm(true)
    direction = true / jnp.where(true_length > 0, true_length, 1.0)
    along = jnp.dot(mean, direction)
    off = jnp.linalg.norm(mean - along * direction)
    bias = jnp.linalg.norm(mean - true)

    def per(x: Array, whole: Array) -> Array:
        return jnp.where(whole == 0, 0.0, x / jnp.where(whole == 0, 1.0, whole))

    # The true mean's direction lies within this angle of the one found.
    found = jnp.arctan2(off, along)
    turn = jnp.where(radius < length, jnp.arcsin(jnp.minimum(per(radius, length), 1.0)), jnp.pi)
    least, most = jnp.maximum(found - turn, 0.0), jnp.minimum(found + turn, jnp.pi)
    square = (least <= jnp.pi / 2) & (most >= jnp.pi / 2)
    exact = radius == 0

    def between(value: Array, low: Array, high: Array) -> Estimate:
        return Estimate(value, jnp.where(exact, value, low), jnp.where(exact, value, high))

    sines = jnp.sin(least), jnp.sin(most)
    ratio, scale = per(length, true_length), per(along, true_length)
    margin = per(radius, true_length)
    return Comparison(
        gradient=_unflatten(params, mean),
        radius=radius,
        bias_norm=between(bias, jnp.maximum(bias - radius, 0.0), bias + radius),
        norm_ratio=between(ratio, jnp.maximum(ratio - margin, 0.0), ratio + margin),
        cosine=between(per(along, length), jnp.cos(most), jnp.cos(least)),
        scale=between(scale, scale - margin, scale + margin),
        residual=between(
            per(off, length),
            jnp.minimum(*sines),
            jnp.where(square, 1.0, jnp.maximum(*sines)),
        ),
    )
