"""MiniRL (arXiv 2512.01374): what happens when the engine that samples is not quite the learner.

(a) The token-level objective against the sequence-level one, exactly: as engine and learner come
together by halves, their gradients' difference halves and their values' difference quarters.

(b) Training. The policy is one linear layer of experts over features of prompt, position and last
token, one expert a token: small enough for all runs to fit one core. The task is to give each
prompt's own digits. The engine rounds its logits to a coarse grid and adds noise to
its router, so that it sends some tokens to other experts. On-policy, one update a batch: MiniRL
with its weight π/μ, and without it (the engine's samples taken for the learner's own). Off-policy,
eight updates a batch: no clip, clip, and clip with the learner's own routes (R2) or the engine's
(R3) replayed.

Exits 1 unless the gap closes as stated; the weight gives the higher final reward; and, at the
lowest of the learning rates tried at which training without a clip falls to half of its peak,
clip and R3 together do not.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import pgjax as pg
from experiments.shared import reproduction
from pgjax.diagnostics import problems, surrogate_gap
from pgjax.objectives import hybrid as recipes

ON_POLICY = ("weighted", "unweighted")
OFF_POLICY = ("no clip", "clip", "clip + R2", "clip + R3")


@dataclasses.dataclass(frozen=True)
class Config:
    prompts: int = 16
    """Each with its own answer."""
    actions: int = 8
    """Digits."""
    horizon: int = 3
    """Digits in an answer."""
    features: int = 24
    """Of prompt, position and last digit."""
    experts: int = 4
    """Of which each token goes to one."""
    grid: float = 1.0
    """Spacing, in nats, to which the engine rounds its logits."""
    router_noise: float = 0.3
    """Standard deviation of the noise on the engine's router logits, fixed over training."""
    group_size: int = 8
    """Samples per prompt and batch."""
    batches: int = 160
    """Sampled, on-policy and off-policy alike."""
    minibatches: int = 8
    """Updates a batch, off-policy."""
    every: int = 8
    """Batches between measurements."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of Adam."""
    seeds: int = 5
    """Runs."""
    out: pathlib.Path = pathlib.Path("runs/engine_mismatch")
    """Directory of results."""
    quick: bool = False
    """Few prompts, batches and arms, one rate."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A mixture of experts over fixed features, and its noisy twin."""

    config: Config
    table: tuple[Float[Array, "P F"], Float[Array, "T F"], Float[Array, "A F"]]
    noise: Float[Array, "T P A E"]
    answers: Int[Array, "P T"]

    def init(self, key: Array) -> dict[str, Array]:
        config = self.config
        router, experts = jax.random.split(key)
        return {
            "router": jax.random.normal(router, (config.features, config.experts)),
            "experts": 0.3
            * jax.random.normal(experts, (config.experts, config.features, config.actions)),
        }

    def _seen(self, tokens: Array) -> Array:
        by_prompt, by_position, by_token = self.table
        last = jnp.pad(tokens[:, 1:-1], ((0, 0), (2, 0)))
        return by_prompt[tokens[:, :1]] + by_position[: tokens.shape[1]] + by_token[last]

    def _routed(self, params: Any, seen: Array, chosen: Array) -> Array:
        gate = jnp.take_along_axis(
            jax.nn.softmax(seen @ params["router"]), chosen[..., None], axis=-1
        )
        picked = jax.nn.one_hot(chosen, self.config.experts)
        every = jnp.einsum("btf,efa->btea", seen, params["experts"])
        return gate * jnp.einsum("btea,bte->bta", every, picked)

    def routes(self, params: Any, tokens: Array) -> Int[Array, "B T"]:
        return jnp.argmax(self._seen(tokens) @ params["router"], axis=-1)

    def engine_routes(self, params: Any, tokens: Array) -> Int[Array, "B T"]:
        last = jnp.pad(tokens[:, 1:-1], ((0, 0), (2, 0)))
        position = jnp.arange(tokens.shape[1])
        noise = self.noise[position, tokens[:, :1], last]
        return jnp.argmax(self._seen(tokens) @ params["router"] + noise, axis=-1)

    def logits(self, params: Any, tokens: Array) -> Array:
        return self._routed(params, self._seen(tokens), self.routes(params, tokens))

    def engine_logits(self, params: Any, tokens: Array) -> Array:
        chosen = self.engine_routes(params, tokens)
        exact = self._routed(params, self._seen(tokens), chosen)
        return jnp.round(exact / self.config.grid) * self.config.grid

    def outputs(self, params: Any, rollout: pg.Rollout, needs: frozenset[str]) -> pg.PolicyOutputs:
        """The rollout's experts where it has any, the router's own otherwise."""
        problem = self.problem()
        if rollout.experts is not None:
            forced = rollout.experts[:, :, 0, 0]
            problem = dataclasses.replace(
                problem,
                logits=lambda params, tokens: self._routed(params, self._seen(tokens), forced),
            )
        return problems.outputs(problem, params, rollout, needs)

    def problem(self) -> problems.TokenProblem:
        return problems.TokenProblem(
            num_prompts=self.config.prompts,
            num_actions=self.config.actions,
            horizon=self.config.horizon,
            logits=self.logits,
            reward=lambda tokens: jnp.mean(
                (tokens[:, 1:] == self.answers[tokens[:, 0]]).astype(jnp.float32), axis=-1
            ),
        )

    def engine(self) -> problems.TokenProblem:
        return dataclasses.replace(self.problem(), logits=self.engine_logits)


def make_model(config: Config) -> Model:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    rows = (config.prompts, 1 + config.horizon, config.actions)
    return Model(
        config=config,
        table=(
            normal(rows[0], config.features) / config.features**0.5,
            normal(rows[1], config.features) / config.features**0.5,
            normal(rows[2], config.features) / config.features**0.5,
        ),
        noise=config.router_noise * normal(rows[1], rows[0], rows[2], config.experts),
        answers=jnp.asarray(rng.integers(0, config.actions, (rows[0], config.horizon))),
    )


def draw(model: Model, params: Any, key: Array, arm: str) -> pg.Rollout:
    """The engine's samples, with what the arm knows of them."""
    rollout = problems.sample(model.engine(), params, key, group_size=model.config.group_size)
    if arm == "unweighted":
        own = model.outputs(params, rollout, frozenset()).logprobs
        return rollout.replace(behavior_logprobs=own)
    if arm == "clip + R2":
        routes = model.routes(params, rollout.tokens)
    elif arm == "clip + R3":
        routes = model.engine_routes(params, rollout.tokens)
    else:
        return rollout
    return rollout.replace(experts=routes[:, :, None, None])


def objective(arm: str) -> pg.Objective:
    return recipes.minirl(low=1.0, high=np.inf) if arm == "no clip" else recipes.minirl()


def measure(model: Model, params: Any, key: Array) -> dict[str, Array]:
    """Of the engine's samples: the engine is what is deployed."""
    rollout = problems.sample(model.engine(), params, key, group_size=model.config.group_size)
    out = model.outputs(params, rollout, frozenset({"entropy"}))
    seen = surrogate_gap.sampled_mismatch(out.logprobs, rollout.behavior_logprobs, rollout.mask)
    assert out.entropy is not None
    return {
        "reward": rollout.rewards.mean(),
        "entropy": pg.aggregate.masked_mean(out.entropy, rollout.mask),
        "KL(engine, learner)": seen.divergence,
    }


def learn(arm: str, model: Model) -> dict[str, Float[np.ndarray, "R S K"]]:
    """Curves of what `measure` gives, by learning rate and seed."""
    config = model.config

    def run_seed(rate: Array, key: Array) -> dict[str, Array]:
        optimizer = optax.adam(rate)
        update = pg.train.make_update(
            model.outputs,
            objective(arm),
            optimizer,
            num_minibatches=config.minibatches if arm in OFF_POLICY else 1,
        )
        init_key, draw_key, measure_key = jax.random.split(key, 3)
        params = model.init(init_key)
        state: Any = pg.train.TrainState(
            params=params, opt_state=optimizer.init(params), step=jnp.int32(0), key=key
        )

        def step(state: Any, _: None) -> tuple[Any, None]:
            batch = draw(model, state.params, jax.random.fold_in(draw_key, state.step), arm)
            return update(state, batch)[0], None

        def interval(state: Any, _: None) -> tuple[Any, dict[str, Array]]:
            state, _ = jax.lax.scan(step, state, None, length=config.every)
            key = jax.random.fold_in(measure_key, state.step)
            return state, measure(model, state.params, key)

        return jax.lax.scan(interval, state, None, length=config.batches // config.every)[1]

    keys = jax.vmap(jax.random.key)(np.arange(config.seeds))
    by_seed = jax.vmap(run_seed, in_axes=(None, 0))
    found = jax.jit(jax.vmap(by_seed, in_axes=(0, None)))(jnp.array(config.rates), keys)
    return {name: np.asarray(x) for name, x in found.items()}


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
    if config.quick:
        config = dataclasses.replace(
            config, prompts=4, horizon=1, batches=4, every=2, rates=(0.03,), seeds=2
        )
    model = make_model(config)
    curves = {}
    off_policy = OFF_POLICY[::3] if config.quick else OFF_POLICY
    for arm in reproduction.track(ON_POLICY + off_policy):
        found = learn(arm, model)
        for index, rate in enumerate(config.rates):
            curves[arm, rate] = {name: x[index] for name, x in found.items()}
    best = {
        arm: max(config.rates, key=lambda rate: curves[arm, rate]["reward"][:, -1].mean())
        for arm in ON_POLICY
    }
    fallen = [rate for rate in config.rates if _kept(curves["no clip", rate]) <= 0.5]
    shown = {
        **{f"{arm}, lr {rate:g}": curves[arm, rate] for arm, rate in best.items()},
        **{f"{arm}, lr {rate:g}": x for (arm, rate), x in curves.items() if arm in off_policy},
    }
    table = {
        name: {
            "final reward": x["reward"][:, -1],
            "peak reward": x["reward"].max(1),
            "final entropy": x["entropy"][:, -1],
            "final KL(engine, learner)": x["KL(engine, learner)"][:, -1],
        }
        for name, x in shown.items()
    }
    batches = config.every * (1 + np.arange(config.batches // config.every))
    return reproduction.Findings(
        title="the engine's reward",
        table=table,
        claims=[
            *_gap_claims(config.seeds),
            _weight_claim(curves, best),
            _stability_claim(curves, fallen),
        ],
        panels={
            title: {
                name: reproduction.band(batches, x[key])
                for name, x in shown.items()
                if name.startswith(ON_POLICY) == on_policy
            }
            for title, key, on_policy in (
                ("reward, on-policy", "reward", True),
                ("reward, eight updates a batch", "reward", False),
                ("KL(engine, learner), on-policy", "KL(engine, learner)", True),
                ("KL(engine, learner), eight updates", "KL(engine, learner)", False),
            )
        },
        x_label="batch",
    )


def _kept(curves: dict[str, Float[np.ndarray, "S K"]]) -> float:
    """Share of its peak that the mean reward keeps to the end."""
    mean = curves["reward"].mean(0)
    return float(mean[-1] / mean.max())


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


def _weight_claim(curves: dict[Any, Any], best: dict[str, float]) -> reproduction.Claim:
    final = {arm: curves[arm, best[arm]]["reward"][:, -1] for arm in ON_POLICY}
    difference = final["weighted"] - final["unweighted"]
    error = difference.std(ddof=1) / difference.size**0.5
    return reproduction.Claim(
        "on-policy, the weight gives the higher final reward, each at its best learning rate",
        bool(difference.mean() > 2 * error),
        f"{difference.mean():+.3f} ± {error:.3f}",
    )


def _stability_claim(curves: dict[Any, Any], fallen: list[float]) -> reproduction.Claim:
    text = (
        "where training without a clip falls to half of its peak, clip and R3 keep more than that"
    )
    if not fallen:
        kept = {rate: _kept(x) for (arm, rate), x in curves.items() if arm == "no clip"}
        seen = ", ".join(f"{k:.0%} at lr {rate:g}" for rate, k in kept.items())
        return reproduction.Claim(text, False, f"without a clip it never fell: kept {seen}")
    rate = min(fallen)
    kept = {arm: _kept(x) for (arm, at), x in curves.items() if at == rate and arm in OFF_POLICY}
    seen = ", ".join(f"{arm} {k:.0%}" for arm, k in kept.items())
    return reproduction.Claim(text, kept["clip + R3"] > 0.5, f"at lr {rate:g} kept: {seen}")


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "engine_mismatch", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
