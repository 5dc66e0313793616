"""COPO (arXiv 2508.04138): prompts whose samples all agree give GRPO nothing to learn from.

(a) Peaked policies: the share of prompts that have any advantage, and the gradient's norm, under
GRPO, DAPO's filter, and COPO, which also lets whole prompts compete. The norms are listed, not
judged: more prompts with signal do not make COPO's gradient the larger one. (b) Training from
there: a linear softmax policy shared by many contexts, confident at the start, so that most groups
agree. COPO's ρ (the entropy at which it switches) is swept; it, and the learning rate where several
are given, are chosen on other seeds than those reported. The paper's ρ = 1.5 has a row of its own,
whatever comes of it. DAPO, whose mean is over the few groups that are left, would need a lower rate
than the others; no claim is made of it.

Exits 1 when COPO's share of prompts with signal is not 1 where GRPO's is below 0.3, or when COPO at
its chosen ρ does not end above GRPO.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import reproduction, tabular
from pgjax.diagnostics import problems
from pgjax.objectives import discriminative as recipes

RHOS = (0.5, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class Config:
    contexts: int = 256
    """Prompts, all of them in every batch."""
    features: int = 24
    """Of a context."""
    actions: int = 8
    """Answers."""
    known: float = 0.3
    """Share of the true weights in the initial ones."""
    confidence: float = 8.0
    """Scale of the initial weights: how peaked the policy is."""
    group_size: int = 6
    """Samples per prompt, the paper's."""
    steps: int = 60
    """Updates, the paper's."""
    rates: tuple[float, ...] = (1024.0,)
    """Learning rates tried for every method. Of 64 to 16384 in powers of 4 this one is the best, or
    level with it, for GRPO and for COPO at ρ = 0.5 and 1.5; all three order alike at each."""
    seeds: int = 5
    """Runs that are reported."""
    tuning_seeds: int = 2
    """Further runs on which learning rates and ρ are chosen."""
    out: pathlib.Path = pathlib.Path("runs/copo_vanishing")
    """Directory of results."""
    quick: bool = False
    """Few contexts, steps and methods."""


def methods(config: Config) -> dict[str, Callable[[], pg.Objective]]:
    if config.quick:
        return {"GRPO": pg.objectives.grpo, "COPO ρ=1.5": recipes.copo}
    return {
        "GRPO": pg.objectives.grpo,
        "DAPO": pg.objectives.dapo,
        **{f"COPO ρ={rho}": functools.partial(recipes.copo, rho=rho) for rho in RHOS},
        "across prompts only": functools.partial(recipes.copo, rho=np.inf),
    }


def make_problem(config: Config) -> tuple[problems.TokenProblem, Array, Array]:
    """The contexts, the true weights, and the right answer to each."""
    rng = np.random.default_rng(0)
    contexts = rng.normal(size=(config.contexts, config.features)) / config.features**0.5
    truth = rng.normal(size=(config.features, config.actions))
    right = jnp.asarray((contexts @ truth).argmax(1))
    seen = jnp.asarray(contexts, jnp.float32)

    def logits(params: Array, tokens: Array) -> Array:
        rows = seen[tokens[:, 0]] @ params
        return jnp.stack([jnp.zeros_like(rows), rows], axis=1)

    problem = problems.TokenProblem(
        num_prompts=config.contexts,
        num_actions=config.actions,
        horizon=1,
        logits=logits,
        reward=lambda tokens: (tokens[:, 1] == right[tokens[:, 0]]).astype(jnp.float32),
        extras=lambda tokens: {"answer_ids": tokens[:, 1]},
    )
    return problem, jnp.asarray(truth, jnp.float32), right


def initial(config: Config, truth: Array, key: Array) -> Array:
    noise = jax.random.normal(key, truth.shape)
    return config.confidence * (config.known * truth + (1 - config.known) * noise)


def measure(problem: problems.TokenProblem, right: Array, params: Array) -> dict[str, Array]:
    prompts = jnp.arange(problem.num_prompts)
    tokens = jnp.stack([prompts, jnp.zeros_like(prompts)], axis=1)
    probabilities = jax.nn.softmax(problem.logits(params, tokens)[:, 1])
    return {"accuracy": jnp.take_along_axis(probabilities, right[:, None], axis=1).mean()}


def signal(
    problem: problems.TokenProblem, objective: pg.Objective, params: Array, rollout: pg.Rollout
) -> tuple[Array, Array]:
    """Share of prompts with any advantage, and the gradient's norm."""
    prepared = objective.prepare(rollout)

    def loss(params: Array) -> Array:
        return objective.value(problems.outputs(problem, params, prepared, frozenset()), prepared)

    share = 1 - pg.objectives.objective.groups_without_signal(prepared)
    return share, jnp.linalg.norm(jax.grad(loss)(params))


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, contexts=32, steps=4, seeds=2, tuning_seeds=1)
    problem, truth, right = make_problem(config)
    init = functools.partial(initial, config, truth)
    total = config.tuning_seeds + config.seeds

    @jax.jit
    @jax.vmap
    def at_the_start(key: Array) -> dict[str, tuple[Array, Array]]:
        params = init(jax.random.fold_in(key, 0))
        rollout = problems.sample(
            problem, params, jax.random.fold_in(key, 1), group_size=config.group_size
        )
        return {
            name: signal(problem, make(), params, rollout) for name, make in methods(config).items()
        }

    keys = jax.vmap(jax.random.key)(np.arange(config.tuning_seeds, total))
    start = at_the_start(keys)
    table: dict[str, dict[str, Float[np.ndarray, " S"]]] = {}
    curves, tuned = {}, {}
    for name, make in reproduction.track(methods(config).items()):
        found = [
            tabular.learn(
                problem,
                make(),
                optax.sgd(rate),
                init=init,
                measure=functools.partial(measure, problem, right),
                group_size=config.group_size,
                steps=config.steps,
                seeds=total,
            )
            for rate in config.rates
        ]
        scores = [x["final/accuracy"][: config.tuning_seeds].mean() for x in found]
        best = int(np.argmax(scores))
        tuned[name] = scores[best]
        kept = {key: x[config.tuning_seeds :] for key, x in found[best].items()}
        curves[name] = kept["accuracy"]
        table[name] = {
            "prompts with signal": np.asarray(start[name][0]),
            "gradient norm": np.asarray(start[name][1]),
            "learning rate": np.full(config.seeds, config.rates[best]),
            "accuracy at the start": kept["accuracy"][:, 0],
            "accuracy": kept["final/accuracy"],
        }
    chosen = max((name for name in tuned if name.startswith("COPO")), key=lambda name: tuned[name])
    steps = np.arange(config.steps)
    return reproduction.Findings(
        title="signal at the start, and accuracy after training",
        table=table,
        claims=[*_signal_claims(table), _ahead(table, chosen)],
        panels={
            "accuracy": {name: reproduction.band(steps, x) for name, x in curves.items()},
        },
    )


def _signal_claims(table: dict[str, dict[str, Any]]) -> list[reproduction.Claim]:
    share = {name: float(x["prompts with signal"].mean()) for name, x in table.items()}
    copo = f"COPO ρ={RHOS[-1]}"
    return [
        reproduction.Claim(
            "every prompt has signal under COPO where under GRPO few have",
            share[copo] == 1 and share["GRPO"] < 0.3,
            f"{share[copo]:.2f} and {share['GRPO']:.2f}",
        ),
    ]


def _ahead(table: dict[str, dict[str, Any]], chosen: str) -> reproduction.Claim:
    """By more than two standard errors of the difference over seeds."""
    return reproduction.ahead(
        f"{chosen}, chosen on other seeds, ends above GRPO",
        table[chosen]["accuracy"],
        table["GRPO"]["accuracy"],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "copo_vanishing", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
