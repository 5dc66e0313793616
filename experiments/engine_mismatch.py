"""MiniRL (arXiv 2512.01374): what happens when the engine that samples is not quite the learner.

(a) The token-level objective against the sequence-level one, exactly: as engine and learner come
together by halves, their gradients' difference halves and their values' difference quarters.

(b) Training a tiny transformer with experts in place of its MLPs (`experiments.shared.digits`), one
of four for each token. The engine has the same weights with fewer bits, and noise on its routers,
so that it sends some tokens to other experts. On-policy, one update a batch: MiniRL with its weight
π/μ, and without it (the engine's samples taken for the learner's own). As the weight matters with
the mismatch, the noise is varied, and the largest with which MiniRL still learns is judged by; that
and each arm's learning rate are chosen on other seeds. Off-policy, eight updates a batch: no clip,
clip, and clip with the learner's own routes (R2) or the engine's (R3) replayed.

Exits 1 unless the gap closes as stated; the weight gives the higher final reward, by two standard
errors; and, at the lowest of the learning rates tried at which training without a clip falls to
half of its peak, that with clip and R3 does not.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import digits, reproduction
from pgjax.diagnostics import problems, surrogate_gap
from pgjax.objectives import hybrid as recipes

ON_POLICY = ("weighted", "unweighted")
OFF_POLICY = ("no clip", "clip", "clip + R2", "clip + R3")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    width: int = 32
    """Of the transformer."""
    experts: int = 4
    """Of which each token goes to one."""
    bits: int = 2
    """Of the mantissas of the engine's weights; float8 has 3 or 2."""
    router_noise: float = 0.5
    """Size of the noise on the engine's routers, fixed over training, as a share of theirs."""
    noises: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """The same on-policy, where it is varied."""
    batches: int = 100
    """Sampled, on-policy and off-policy alike."""
    pretraining: int = 300
    """Updates on demonstrations, before."""
    minibatches: int = 8
    """Updates a batch, off-policy."""
    rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)
    """Learning rates of Adam, on-policy."""
    off_policy_rates: tuple[float, ...] = (0.001, 0.0015, 0.002, 0.003)
    """The same off-policy, where training without a clip begins to fall."""
    learns: float = 0.3
    """By how much the reward of a run that learns grows."""
    seeds: int = 5
    """Runs."""
    tuning_seeds: int = 3
    """Others, by which rates and noise are chosen on-policy."""
    out: pathlib.Path = pathlib.Path("runs/engine_mismatch")
    """Directory of results."""
    quick: bool = False
    """Few prompts, batches and arms, one rate."""


def engine(config: Config, params: Any) -> Any:
    """The learner's parameters as the engine holds them."""

    def rounded(x: Array) -> Array:
        mantissa, exponent = jnp.frexp(x)
        scale = 2.0 ** (config.bits + 1)  # the leading bit is not stored
        return jnp.ldexp(jnp.round(mantissa * scale) / scale, exponent)

    decoder = jax.tree.map(rounded, params["decoder"])
    moe = decoder["layers"]["moe"]
    router = moe["router"]
    noise = jax.random.normal(jax.random.key(7), router.shape)
    size = jnp.std(router, axis=(1, 2), keepdims=True)
    moe = {**moe, "router": router + config.router_noise * size * noise}
    return {"decoder": {**decoder, "layers": {**decoder["layers"], "moe": moe}}}


def learn(
    arm: str, config: Config, task: digits.Digits, decoder: pg.models.FunctionalDecoder
) -> digits.Curves:
    """Training by one arm; the reward is that of the engine, which is deployed."""
    outputs = pg.train.language_model_outputs(decoder)

    def draw(params: Any, key: Array) -> pg.sampling.Samples:
        return digits.sample(task, decoder, engine(config, params), key, record_experts=True)

    def prepare(params: Any, rollout: pg.Rollout) -> pg.Rollout:
        rollout = rollout.replace(extras={"engine_logprobs": rollout.behavior_logprobs})
        if arm == "clip + R3":
            return rollout
        if arm == "clip + R2":
            return pg.train.record_experts(decoder, params, rollout)
        rollout = rollout.replace(experts=None)
        if arm == "unweighted":
            own = outputs(params, rollout, frozenset()).logprobs
            return rollout.replace(behavior_logprobs=jnp.where(rollout.mask, own, 0.0))
        return rollout

    def measure(state: pg.train.TrainState, rollout: pg.Rollout) -> dict[str, Array]:
        own = outputs(state.params, rollout.replace(experts=None), frozenset()).logprobs
        assert rollout.extras is not None
        engines = rollout.extras["engine_logprobs"]
        mismatch = surrogate_gap.sampled_mismatch(own, engines, rollout.mask)
        return {"KL(engine, learner)": mismatch.divergence}

    return digits.learner(
        task,
        decoder,
        recipes.minirl(low=1.0, high=np.inf) if arm == "no clip" else recipes.minirl(),
        lambda rate: optax.adam(digits.increasing(10, rate)),
        steps=config.batches,
        pretraining=config.pretraining,
        reward=lambda formed, right: formed * right,
        draw=draw,
        prepare=prepare,
        measure=measure,
        num_minibatches=config.minibatches if arm in OFF_POLICY else 1,
    )


class OnPolicy(NamedTuple):
    """An arm at one noise: best rate on the tuning seeds, gain there, curves on the others."""

    rate: float
    gain: float
    curves: dict[str, Float[np.ndarray, "S K"]]


def on_policy(
    arm: str, config: Config, task: digits.Digits, decoder: pg.models.FunctionalDecoder
) -> OnPolicy:
    curves_of, label = learn(arm, config, task, decoder), f"{arm}, noise {config.router_noise:g}"
    tuning = curves_of(rates=config.rates, seeds=config.tuning_seeds, first_seed=1000, label=label)
    rewards = np.stack([reproduction.smooth(x).mean(0) for x in tuning["reward"]])
    best = int(np.argmax(rewards[:, -1]))
    found = curves_of(rates=(config.rates[best],), seeds=config.seeds, label=label)
    curves = {name: reproduction.smooth(x[0]) for name, x in found.items()}
    return OnPolicy(config.rates[best], float(rewards[best, -1] - rewards[best, 0]), curves)


def gaps(seeds: int) -> dict[str, Float[np.ndarray, "S K"]]:
    """Of values and gradients, for perturbations halved from one to the next."""
    sizes = jnp.array([0.04, 0.02, 0.01])
    actions, horizon = 3, 3

    def logits(params: Array, tokens: Array) -> Array:
        before = (jnp.cumsum(tokens, axis=1) - tokens) % actions
        return params[jnp.arange(tokens.shape[1]), before]

    def of(key: Array) -> dict[str, Array]:
        rewards, start, direction = jax.random.split(key, 3)
        table = jax.random.normal(rewards, (actions,) * horizon, jnp.float64)
        problem = problems.TokenProblem(
            num_prompts=1,
            num_actions=actions,
            horizon=horizon,
            logits=logits,
            reward=lambda tokens: table[tuple(tokens[:, 1:].T)],
        )
        shape = (1 + horizon, actions, actions)
        params = jax.random.normal(start, shape, jnp.float64)
        step = jax.random.normal(direction, shape, jnp.float64)
        found = jax.vmap(
            lambda size: surrogate_gap.exact_gap(problem, params + size * step, params)
        )(sizes)
        return {"value": jnp.abs(found.value), "gradient": found.gradient_norm}

    with jax.enable_x64(True):
        found = jax.jit(jax.vmap(of))(jax.vmap(jax.random.key)(np.arange(seeds)))
        return {name: np.asarray(x) for name, x in found.items()}


def run(config: Config) -> reproduction.Findings:
    task = digits.Digits()
    if config.quick:
        task = dataclasses.replace(task, prompts=2, group_size=4)
        config = dataclasses.replace(
            config, width=16, pretraining=0, batches=4, minibatches=2, seeds=2, tuning_seeds=1
        )
        config = dataclasses.replace(config, noises=(0.5,), rates=(1e-3,), off_policy_rates=(1e-3,))
    experts = pg.models.MoEConfig(
        num_experts=config.experts,
        experts_per_token=1,
        expert_size=2 * config.width,
        normalize_weights=False,
    )
    decoder = digits.make_decoder(task, width=config.width, moe=experts)
    pairs: dict[float, dict[str, OnPolicy]] = {
        noise: {
            arm: on_policy(arm, dataclasses.replace(config, router_noise=noise), task, decoder)
            for arm in ON_POLICY
        }
        for noise in config.noises
    }
    off_policy = OFF_POLICY[::3] if config.quick else OFF_POLICY
    curves = {}
    for arm in off_policy:
        curves_of = learn(arm, config, task, decoder)
        found = curves_of(rates=config.off_policy_rates, seeds=config.seeds, label=arm)
        for index, rate in enumerate(config.off_policy_rates):
            curves[arm, rate] = {name: reproduction.smooth(x[index]) for name, x in found.items()}
    groups = {
        f"noise {noise:g}": {f"{arm}, lr {x.rate:g}": x.curves for arm, x in arms.items()}
        for noise, arms in pairs.items()
    } | {
        f"eight updates, lr {rate:g}": {arm: curves[arm, rate] for arm in off_policy}
        for rate in config.off_policy_rates
    }
    table = {
        f"{title}, {arm}": {
            "final reward": x["reward"][:, -1],
            "peak reward": x["reward"].max(1),
            "final entropy": x["entropy"][:, -1],
            "final KL(engine, learner)": x["KL(engine, learner)"][:, -1],
        }
        for title, arms in groups.items()
        for arm, x in arms.items()
    }
    batches = np.arange(curves["no clip", config.off_policy_rates[0]]["reward"].shape[1])
    return reproduction.Findings(
        title="the engine's reward",
        table=table,
        claims=[*_gap_claims(config.seeds), _weight_claim(pairs, config), _stability_claim(curves)],
        panels={
            title: {arm: reproduction.band(batches, x["reward"]) for arm, x in arms.items()}
            for title, arms in groups.items()
        },
        x_label="batch",
    )


def _kept(curves: dict[str, Float[np.ndarray, "S K"]]) -> float:
    """Share of its peak that the mean reward keeps to the end."""
    mean = curves["reward"].mean(0)
    return float(mean[-1] / max(mean.max(), 1e-9))


def _gap_claims(seeds: int) -> list[reproduction.Claim]:
    found = gaps(seeds)
    return [
        reproduction.Claim(
            f"halving the difference divides the {name} gap by about {factor}",
            bool(np.all(np.abs(ratio / factor - 1) < 0.2)),
            f"by {ratio.min():.2f} to {ratio.max():.2f}",
        )
        for name, factor in (("value", 4), ("gradient", 2))
        for ratio in [np.median(found[name][:, :-1] / found[name][:, 1:], axis=0)]
    ]


def _weight_claim(pairs: dict[float, dict[str, OnPolicy]], config: Config) -> reproduction.Claim:
    text = "at the largest noise with which it learns on-policy, the weight ends higher by two s.e."
    learning = [noise for noise, arms in pairs.items() if arms["weighted"].gain >= config.learns]
    if not learning:
        return reproduction.Claim(text, False, "it never learnt")
    arms = pairs[max(learning)]
    difference = np.subtract(*(arms[arm].curves["reward"][:, -1] for arm in ON_POLICY))
    error = reproduction.standard_error(difference)
    seen = f"at noise {max(learning):g}: {difference.mean():+.3f} ± {error:.3f}"
    return reproduction.Claim(text, bool(difference.mean() > 2 * error), seen)


def _stability_claim(curves: dict[tuple[str, float], Any]) -> reproduction.Claim:
    text = "where training without a clip falls to half of its peak, that with clip and R3 does not"
    kept = {key: _kept(x) for key, x in curves.items()}
    fallen = [rate for (arm, rate), x in kept.items() if arm == "no clip" and x <= 0.5]
    rate = min(fallen, default=max(rate for _, rate in kept))
    seen = ", ".join(f"{arm} {x:.0%}" for (arm, at), x in kept.items() if at == rate)
    holds = bool(fallen) and kept["clip + R3", rate] > 0.5
    return reproduction.Claim(text, holds, f"at lr {rate:g} kept: {seen}")


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "engine_mismatch", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
