"""DisCO (arXiv 2505.12366): does an update without difficulty weights serve the hard questions?

GRPO's update of a question with success rate p is scaled by `sqrt(p (1 - p))`, Dr. GRPO's by
`p (1 - p)`; DisCO's by nothing. (a) The weights are measured on the library's own advantages.
(b) 60 questions with initial success rates from 1% to 90%, evenly on a logarithmic scale, share
part of their policy and are learnt together; what counts is the accuracy on the hardest third after
a fixed number of steps, for every method at the learning rate (of one grid for all) that was best
for its own hardest third on other seeds.

There is one update a batch, so the policy is still the one that sampled and the trust region's
penalty is 0: the comparison is of the weights alone.

Exits 1 when the weights are not as stated, when DisCO is not ahead of GRPO, Dr. GRPO and DAPO on
the hardest third, or when its entropy grows or collapses.
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
from pgjax.surrogates import discriminative

METHODS: dict[str, Callable[[], pg.Objective]] = {
    "GRPO": pg.objectives.grpo,
    "Dr. GRPO": functools.partial(pg.objectives.dr_grpo, length=1),
    "DAPO": pg.objectives.dapo,
    "DisCO-b": recipes.disco_b,
    "DisCO": recipes.disco,
}
BASELINES = ("GRPO", "Dr. GRPO", "DAPO")


@dataclasses.dataclass(frozen=True)
class Config:
    prompts: int = 60
    """Questions, a multiple of 3."""
    actions: int = 10
    """Answers to each, one of which is right."""
    rank: int = 8
    """Features of a question through which it shares weights with the others."""
    group_size: int = 8
    """Samples per question and step."""
    steps: int = 60
    """Updates."""
    rates: tuple[float, ...] = (6.25, 12.5, 25.0, 50.0, 100.0, 200.0, 400.0)
    """Learning rates tried for every method."""
    seeds: int = 14
    """Runs that are reported."""
    tuning_seeds: int = 6
    """Further runs on which learning rates are chosen."""
    out: pathlib.Path = pathlib.Path("runs/disco_difficulty")
    """Directory of results."""
    quick: bool = False
    """Few questions, steps and methods, one rate."""


def success_rates(config: Config) -> Float[np.ndarray, " P"]:
    return np.geomspace(0.01, 0.9, config.prompts)


def make_problem(config: Config) -> tuple[problems.TokenProblem, Array]:
    """The questions, and which answer to each is right."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(config.prompts, config.rank)) / config.rank**0.5
    right = jnp.asarray(rng.integers(0, config.actions, config.prompts))
    shared = jnp.asarray(features, jnp.float32)

    def logits(params: Any, tokens: Array) -> Array:
        rows = (params["own"] + shared @ params["shared"])[tokens[:, 0]]
        return jnp.stack([jnp.zeros_like(rows), rows], axis=1)

    problem = problems.TokenProblem(
        num_prompts=config.prompts,
        num_actions=config.actions,
        horizon=1,
        logits=logits,
        reward=lambda tokens: (tokens[:, 1] == right[tokens[:, 0]]).astype(jnp.float32),
    )
    return problem, right


def initial(config: Config, right: Array, key: Array) -> dict[str, Array]:
    """Parameters with the given success rates; how the rest is spread is the seed's."""
    p = jnp.asarray(success_rates(config), jnp.float32)[:, None]
    is_right = jax.nn.one_hot(right, config.actions, dtype=bool)
    noise = jax.random.normal(key, is_right.shape)
    others = jax.nn.log_softmax(jnp.where(is_right, -jnp.inf, noise)) + jnp.log(1 - p)
    return {
        "own": jnp.where(is_right, jnp.log(p), others),
        "shared": jnp.zeros((config.rank, config.actions)),
    }


def measure(problem: problems.TokenProblem, right: Array, params: Any) -> dict[str, Array]:
    prompts = jnp.arange(problem.num_prompts)
    tokens = jnp.stack([prompts, jnp.zeros_like(prompts)], axis=1)
    logprobs = jax.nn.log_softmax(problem.logits(params, tokens)[:, 1])
    accuracy = jnp.exp(jnp.take_along_axis(logprobs, right[:, None], axis=1)[:, 0])
    thirds = accuracy.reshape(3, -1).mean(1)
    return {
        "hard": thirds[0],
        "medium": thirds[1],
        "easy": thirds[2],
        "accuracy": accuracy.mean(),
        "entropy_exact": -jnp.sum(jnp.exp(logprobs) * logprobs, axis=1).mean(),
    }


def learn(
    objective: pg.Objective, config: Config, problem: problems.TokenProblem, right: Array
) -> dict[str, Float[np.ndarray, "R S K"]]:
    """Curves by learning rate and seed, those for tuning first; `"final/..."` after the last."""
    return tabular.learn_at_rates(
        problem,
        objective,
        optax.sgd,
        rates=config.rates,
        seeds=config.tuning_seeds + config.seeds,
        init=functools.partial(initial, config, right),
        measure=functools.partial(measure, problem, right),
        group_size=config.group_size,
        steps=config.steps,
    )


def update_weights(group_size: int) -> dict[str, Float[np.ndarray, " K"]]:
    """What the right samples of a question weigh together, for each number of them."""
    right = np.arange(1, group_size)
    rewards = jnp.asarray(np.arange(group_size) < right[:, None], jnp.float32).reshape(-1)
    ids = jnp.repeat(jnp.arange(right.size), group_size)
    options: dict[str, Any] = {"num_groups": right.size}

    def of(advantages: Array) -> Float[np.ndarray, " K"]:
        positive = jnp.maximum(advantages, 0.0)
        return np.asarray(pg.segments.total(positive, ids, num_segments=right.size))

    return {
        "GRPO": of(
            pg.advantages.group_normalize(rewards, ids, ddof=0, epsilon=0.0, **options) / group_size
        ),
        "Dr. GRPO": of(pg.advantages.centered(rewards, ids, **options) / group_size),
        "DisCO": of(discriminative.class_balanced(rewards, ids, **options)),
    }


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config, prompts=9, steps=4, rates=(100.0,), seeds=2, tuning_seeds=1
        )
    problem, right = make_problem(config)
    curves, table = {}, {}
    for name in reproduction.track(("GRPO", "DisCO") if config.quick else METHODS):
        found = learn(METHODS[name](), config, problem, right)
        best = int(np.argmax(found["final/hard"][:, : config.tuning_seeds].mean(1)))
        kept = {key: x[best, config.tuning_seeds :] for key, x in found.items()}
        curves[name] = kept
        table[name] = {
            "learning rate": np.full(config.seeds, config.rates[best]),
            **{key: kept[f"final/{key}"] for key in ("hard", "medium", "easy", "entropy_exact")},
        }
    rates = np.arange(1, config.group_size) / config.group_size
    weights = update_weights(config.group_size)
    stated = {
        "GRPO": np.sqrt(rates * (1 - rates)),
        "Dr. GRPO": rates * (1 - rates),
        "DisCO": np.ones_like(rates),
    }
    error = max(float(np.abs(weights[name] - stated[name]).max()) for name in stated)
    steps = np.arange(config.steps)
    return reproduction.Findings(
        title="accuracy by difficulty, every method at its best learning rate",
        table=table,
        claims=[
            reproduction.Claim(
                "update weights are sqrt(p(1-p)), p(1-p) and 1", error < 1e-5, f"off by {error:.1e}"
            ),
            *(_ahead(table, name) for name in BASELINES if name in table),
            _entropy(curves["DisCO"]),
        ],
        panels={
            "weight of a question's update (x: success rate in %)": {
                name: (100 * rates, x) for name, x in weights.items()
            },
            "accuracy on the hardest third": {
                name: reproduction.band(steps, x["hard"]) for name, x in curves.items()
            },
            "accuracy": {
                name: reproduction.band(steps, x["accuracy"]) for name, x in curves.items()
            },
            "entropy (nats)": {
                name: reproduction.band(steps, x["entropy_exact"]) for name, x in curves.items()
            },
        },
    )


def _ahead(table: dict[str, dict[str, Any]], name: str) -> reproduction.Claim:
    """By more than two standard errors of the difference over seeds."""
    difference = table["DisCO"]["hard"] - table[name]["hard"]
    error = difference.std(ddof=1) / difference.size**0.5
    return reproduction.Claim(
        f"DisCO is ahead of {name} on the hardest third",
        bool(difference.mean() > 2 * error),
        f"{difference.mean():+.3f} ± {error:.3f}",
    )


def _entropy(curves: dict[str, Float[np.ndarray, "S K"]]) -> reproduction.Claim:
    entropy, accuracy = curves["entropy_exact"].mean(0), curves["accuracy"].mean(0)
    before = entropy[accuracy < 0.9]
    lowest = before.min() / entropy[0]
    final = float(curves["final/entropy_exact"].mean()) / entropy[0]
    return reproduction.Claim(
        "DisCO's entropy keeps 10% of its start until 90% accuracy, and does not grow",
        bool(lowest >= 0.1 and final <= 1),
        f"{lowest:.0%} until then, {final:.0%} at the end",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "disco_difficulty", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
