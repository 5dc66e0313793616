"""Baselines of least variance, and step sizes from the signal-to-noise ratio (OBLR-PO).

First part, on random bandits from even to peaked policies: the optimal baseline `E[R w] / E[w]`,
with `w` the squared score norm, must give a smaller exact variance of the gradient than the mean
reward on every problem; estimated from a group it must beat leave-one-out means for groups of 32
and peaked policies; estimated from earlier samples of the prompt it must do so for groups of 8,
too. Second part, on a bandit with noisy rewards: over a sweep of learning rates, fewer runs must be
lost with `optim.scale_by_gradient_snr` than with constant steps, and at its best learning rate no
fewer may reach the target (arXiv 2511.23310). A run is lost when it has settled on a wrong arm, so
that it will not reach the target any more; one that is merely slow is not. Exits with 1 if that
does not show.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax import objectives, optim
from pgjax.advantages import optimal_baseline
from pgjax.diagnostics import problems
from pgjax.objectives import baselines

MEAN_ALONE = baselines.oblr_with_history(
    num_prompts=1, weights=lambda rollout: jnp.ones(rollout.rewards.shape)
)
FROM_HISTORY = baselines.oblr_with_history(num_prompts=1)
NO_BASELINE = objectives.reinforce()


@dataclasses.dataclass(frozen=True)
class Config:
    """Random bandits, and one with noisy rewards."""

    seeds: int = 160
    """Random bandits for each spread of the logits; runs of each learning rate."""
    arms: int = 8
    """Of the random bandits."""
    scales: tuple[float, ...] = (0.5, 1.5, 3.0)
    """Standard deviations of their logits: from even to peaked."""
    group_sizes: tuple[int, ...] = (8, 32)
    """Samples per prompt."""
    batches: int = 500
    """Gradients from which a variance is measured."""
    history: int = 8
    """Earlier batches from which the history is made."""
    rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    """Learning rates of the second part."""
    steps: int = 400
    """Updates of the second part."""
    microbatches: int = 4
    """Parts of a batch, from which signal and noise are estimated."""
    microbatch_size: int = 4
    """Samples of a part."""
    settled: float = 0.99
    """Probability of one arm from which a policy counts as settled on it."""
    target: float = 0.75
    """Expected reward to be reached: the best arm pays 0.8 on average, the next 0.7."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/oblr_variance")
    """Directory for table and plot."""


def quick(config: Config) -> Config:
    return dataclasses.replace(
        config,
        seeds=3,
        scales=(3.0,),
        group_sizes=(8,),
        batches=50,
        rates=(1.0, 16.0),
        steps=20,
    )


def gradient(
    problem: problems.TokenProblem,
    objective: objectives.Objective,
    params: Array,
    rollout: Any,
    memory: Any = None,
) -> tuple[Array, Any]:
    """Ascent direction of one batch, and the memory after it."""
    old = problems.outputs(problem, params, rollout, objective.old_needs)
    prepared, memory = objective.prepare_and_remember(rollout.replace(old=old, memory=memory))

    def loss(params: Array) -> Array:
        return objective.value(
            problems.outputs(problem, params, prepared, objective.needs), prepared
        )

    return -jax.grad(loss)(params), memory


def exact_variance(
    problem: problems.TokenProblem, params: Array, baseline: Array, tokens: Array
) -> Float[Array, ""]:
    """Trace of the covariance of one sample's gradient, by summing over all of them."""
    objective = dataclasses.replace(
        NO_BASELINE, advantage=lambda rollout: rollout.rewards - baseline
    )
    each = jax.vmap(
        lambda row: gradient(
            problem, objective, params, problems.rollout_of(problem, row[None], params)
        )[0]
    )(tokens)
    weights = jnp.exp(problems.log_probability(problem, params, tokens))
    mean = jnp.tensordot(weights, each, axes=1)
    return weights @ jnp.sum(each**2, axis=(1, 2)) - jnp.sum(mean**2)


def optimal_baselines(
    problem: problems.TokenProblem, params: Array, tokens: Array
) -> tuple[Array, Array]:
    """The mean reward, and `E[R w] / E[w]`, by summing over all samples."""
    rollout = problems.rollout_of(problem, tokens, params)
    weights = jnp.exp(problems.log_probability(problem, params, tokens))
    old = problems.outputs(problem, params, rollout, frozenset({"square_sum"}))
    norms = optimal_baseline.score_norm_proxy(old.logprobs, old.square_sum, rollout.mask)
    centered = optimal_baseline.weighted_centered(
        rollout.rewards, weights * norms, jnp.zeros_like(tokens[:, 0]), num_groups=1
    )
    return weights @ rollout.rewards, rollout.rewards[0] - centered[0]


def random_bandit(config: Config, scale: Array, seed: Array) -> tuple[Array, Array]:
    """Logits and rewards `[1, arms]`, float32 in any case."""
    keys = jax.random.split(jax.random.key(seed), 4)
    logits = jax.random.normal(keys[0], (1, config.arms), jnp.float32)
    rewards = jax.random.uniform(keys[1], (1, config.arms), jnp.float32)
    return scale * logits, rewards


def exact_variances(config: Config, scale: float) -> dict[str, Float[np.ndarray, " S"]]:
    """Of one sample's gradient, in float64: baselines of even policies differ by very little."""
    seeds = jnp.arange(config.seeds)
    drawn = jax.vmap(functools.partial(random_bandit, config, jnp.float32(scale)))(seeds)
    logits, rewards = (np.asarray(x, np.float64) for x in drawn)
    tokens = problems.all_sequences(problems.bandit(jnp.zeros((1, config.arms))))

    def of(logits: Array, rewards: Array) -> dict[str, Array]:
        problem = problems.bandit(rewards)
        mean, best = optimal_baselines(problem, logits, jnp.asarray(tokens))
        chosen = {"exact none": jnp.zeros_like(mean), "exact mean": mean, "exact optimal": best}
        return {
            name: exact_variance(problem, logits, baseline, jnp.asarray(tokens))
            for name, baseline in chosen.items()
        }

    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(of))(jnp.asarray(logits), jnp.asarray(rewards))
        return {name: np.asarray(x) for name, x in found.items()}


def variances(config: Config, group_size: int) -> dict[float, dict[str, Float[np.ndarray, " S"]]]:
    """For each scale, of every method's gradient, one number per problem."""

    def sampled(
        problem: problems.TokenProblem,
        objective: objectives.Objective,
        params: Array,
        key: Array,
        memory: Any = None,
    ) -> Array:
        def one(key: Array) -> Array:
            rollout = problems.sample(problem, params, key, group_size=group_size)
            rollout = rollout.replace(extras={"prompt_ids": rollout.group_ids})
            return gradient(problem, objective, params, rollout, memory)[0]

        found = jax.vmap(one)(jax.random.split(key, config.batches))
        return jnp.sum(jnp.var(found, axis=0, ddof=1))

    def remembered(
        problem: problems.TokenProblem, objective: objectives.Objective, params: Array, key: Array
    ) -> Any:
        assert objective.memory is not None
        rollout = problems.sample(problem, params, key, group_size=config.history * group_size)
        rollout = rollout.replace(extras={"prompt_ids": rollout.group_ids})
        return gradient(problem, objective, params, rollout, objective.memory.init())[1]

    def measure(scale: Array, seed: Array) -> dict[str, Array]:
        keys = jax.random.split(jax.random.key(seed), 4)
        params, rewards = random_bandit(config, scale, seed)
        problem = problems.bandit(rewards)
        found = {}
        for name, objective in {
            "none": NO_BASELINE,
            "leave-one-out mean": objectives.rloo(),
            "leave-one-out optimal": baselines.oblr(),
        }.items():
            found[name] = sampled(problem, objective, params, keys[2])
        for name, objective in {
            "mean of history": MEAN_ALONE,
            "optimal of history": FROM_HISTORY,
        }.items():
            memory = remembered(problem, objective, params, keys[3])
            found[name] = sampled(problem, objective, params, keys[2], memory)
        return found

    @jax.jit
    def over_seeds(scale: Array) -> dict[str, Array]:
        seeds = jnp.arange(config.seeds)
        return jax.lax.map(functools.partial(measure, scale), seeds)  # one at a time: less memory

    found = {}
    for scale in config.scales:
        exact = {name: x / group_size for name, x in exact_variances(config, scale).items()}
        measured = over_seeds(jnp.float32(scale))
        found[scale] = exact | {name: np.asarray(x) for name, x in measured.items()}
    return found


def noisy_bandit() -> problems.TokenProblem:
    """Ten arms that pay 1 with probability 0.2 to 0.7, and one with 0.8: nature draws."""
    chances = jnp.array([*np.linspace(0.2, 0.7, 9), 0.8], jnp.float32)
    policy_then_nature = jnp.array([problems.NOBODY, problems.POLICY, problems.NATURE])

    def nature(tokens: Array) -> Array:
        pays = chances[tokens[:, 1]]
        blank = [jnp.zeros_like(pays)] * 8
        row = jnp.stack([1 - pays, pays, *blank], axis=-1)
        return jnp.broadcast_to(row[:, None], (*tokens.shape, 10))

    return problems.TokenProblem(
        num_prompts=1,
        num_actions=10,
        horizon=2,
        logits=lambda params, tokens: jnp.broadcast_to(params, (*tokens.shape, 10)),
        reward=lambda tokens: (tokens[:, 2] == 1).astype(jnp.float32),
        roles=lambda tokens: jnp.broadcast_to(policy_then_nature, tokens.shape),
        nature=nature,
    )


def learning_curves(
    config: Config, transform: optax.GradientTransformationExtraArgs
) -> tuple[Float[np.ndarray, "rates seeds steps"], Float[np.ndarray, "rates seeds arms"]]:
    """Exact expected reward before every update and after the last; the last policy."""
    problem, objective = noisy_bandit(), objectives.rloo()
    tokens = jnp.asarray(problems.all_sequences(problem))

    def value(params: Array) -> Array:
        return jnp.exp(problems.log_probability(problem, params, tokens)) @ problem.reward(tokens)

    def run(rate: Array, seed: Array) -> tuple[Array, Array]:
        params = jnp.zeros(10)

        def part(params: Array, key: Array) -> Array:
            rollout = problems.sample(problem, params, key, group_size=config.microbatch_size)
            return gradient(problem, objective, params, rollout)[0]

        def step(carry: Any, key: Array) -> tuple[Any, Array]:
            params, state = carry
            keys = jax.random.split(key, config.microbatches)
            parts = jax.vmap(part, in_axes=(None, 0))(params, keys)
            moments = optim.gradient_moments(parts)
            update, state = transform.update(parts.mean(0), state, params, moments=moments)
            return (optax.apply_updates(params, rate * update), state), value(params)

        keys = jax.random.split(jax.random.key(seed), config.steps)
        (params, _), curve = jax.lax.scan(step, (params, transform.init(params)), keys)
        return jnp.append(curve, value(params)), jax.nn.softmax(params)

    over_seeds = jax.vmap(run, in_axes=(None, 0))
    runs = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))
    curves, policies = runs(jnp.array(config.rates), np.arange(config.seeds))
    return np.asarray(curves), np.asarray(policies)


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = quick(config)
    by_size = {
        size: variances(config, size)
        for size in reproduction.track(config.group_sizes, "group sizes")
    }
    found = {
        (scale, size): by_size[size][scale]
        for scale in config.scales
        for size in config.group_sizes
    }
    table: dict[str, dict[str, Any]] = {}
    for (scale, size), methods in found.items():
        for method, values in methods.items():
            plain = methods["leave-one-out mean"]
            table.setdefault(f"variance: {method}", {})[f"σ={scale:g}, G={size}"] = values / plain
    constant = optax.with_extra_args_support(optax.identity())
    runs = {
        "constant": learning_curves(config, constant),
        "SNR": learning_curves(config, optim.scale_by_gradient_snr()),
    }
    curves = {name: curve for name, (curve, _) in runs.items()}
    reached = {name: x[:, :, -1] >= config.target for name, x in curves.items()}
    lost = {name: _lost(policies, config.settled) for name, (_, policies) in runs.items()}
    for title, outcome in (("target reached", reached), ("lost", lost)):
        for name, rows in outcome.items():
            table[f"{title}: {name}"] = {
                f"rate {rate:g}": hits.astype(float)
                for rate, hits in zip(config.rates, rows, strict=True)
            }
    claims = list(_variance_claims(config, found))
    per_seed = {name: x.mean(0) for name, x in lost.items()}
    difference = per_seed["constant"] - per_seed["SNR"]
    error = reproduction.standard_error(difference)
    reach = {name: x.mean() for name, x in reached.items()}
    claims.append(
        reproduction.Claim(
            "over the sweep of learning rates fewer runs are lost with SNR steps",
            bool(difference.mean() > 2 * error),
            f"{per_seed['SNR'].mean():.1%} against {per_seed['constant'].mean():.1%}, "
            f"difference {difference.mean():.1%} ± {error:.1%} (target reached by "
            f"{reach['SNR']:.1%} and {reach['constant']:.1%})",
        )
    )
    best = {name: x.mean(1).max() for name, x in reached.items()}
    claims.append(
        reproduction.Claim(
            "at each one's best learning rate, too, at least as many",
            bool(best["SNR"] >= best["constant"]),
            f"{best['SNR']:.1%} against {best['constant']:.1%}",
        )
    )
    panels: dict[str, dict[str, Any]] = {}
    for i, rate in enumerate(config.rates):
        panels[f"noisy bandit, learning rate {rate:g}"] = {
            name: reproduction.band(np.arange(config.steps + 1), x[i]) for name, x in curves.items()
        }
    return reproduction.Findings(
        title=f"Variance relative to leave-one-out means; runs that reach {config.target:g}",
        table=table,
        claims=claims,
        panels=panels,
    )


def _lost(policies: Float[np.ndarray, "R S A"], settled: float) -> np.ndarray:
    """Runs whose policy has all but settled on an arm that is not the best, which is the last."""
    most = policies.argmax(-1)
    return (policies.max(-1) >= settled) & (most != policies.shape[-1] - 1)


def _variance_claims(config: Config, found: Any) -> Any:
    one_size = (found[scale, min(config.group_sizes)] for scale in config.scales)
    better = [m["exact optimal"] < m["exact mean"] for m in one_size]
    yield reproduction.Claim(
        "the exact optimal baseline has the smaller variance on every problem",
        bool(np.all(better)),
        f"on {int(np.sum(better))} of {np.size(better)}",
    )
    peaked, large = max(config.scales), max(config.group_sizes)
    small = min(config.group_sizes)
    for text, key, method, other in (
        (
            f"estimated from groups of {large}, policies peaked",
            (peaked, large),
            "leave-one-out optimal",
            "leave-one-out mean",
        ),
        (
            f"estimated from history, groups of {small}, policies peaked",
            (peaked, small),
            "optimal of history",
            "leave-one-out mean",
        ),
        (
            f"the same against the mean of the same history, groups of {small}",
            (peaked, small),
            "optimal of history",
            "mean of history",
        ),
    ):
        ratio = found[key][method] / found[key][other]
        error = reproduction.standard_error(ratio)
        yield reproduction.Claim(
            f"{text}: the variance is below that of the {other}",
            bool(ratio.mean() + 2 * error < 1),
            f"{ratio.mean():.3f} ± {error:.3f} of it",
        )


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main("oblr_variance", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
