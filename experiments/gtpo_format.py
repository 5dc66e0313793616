"""GTPO: fine-tuning for answers without losing the format they have to come in.

A completion is an opening token, answer digits and a closing token, which ends it; the policy
starts out with that format mostly right and the digits at random. The reward is 1 for each format
token in place and 10 more for the prompt's right digits in perfect format. Logits are one table
shared by all prompts plus one a prompt.

Compared over a long run at one learning rate: GRPO without and with a KL penalty, GTPO, and GTPO
without its conflict weights, its entropy gate, its entropy term. The learning rate is the largest
of the list at which GRPO without KL still learns at all, judged on seeds of its own. Exits 1 if
GTPO's lowest format rate after warm-up lies below GRPO's, if its entropy blows up, or if GRPO does
not degrade at that learning rate, so that there is nothing to protect from.
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
from jaxtyping import Array

import pgjax as pg
from experiments.shared import reproduction, tabular
from pgjax import objectives
from pgjax.diagnostics import problems
from pgjax.objectives import token_selection

OPEN, CLOSE, FIRST_DIGIT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    out: pathlib.Path = pathlib.Path("runs/gtpo_format")
    """Where results go."""
    seeds: int = 5
    """Independent runs of every method."""
    steps: int = 400
    """Batches."""
    warm_up: int = 50
    """Batches before format rates count."""
    prompts: int = 8
    """Prompts in every batch."""
    group_size: int = 8
    """Samples of each prompt."""
    digits: int = 2
    """Of an answer."""
    choices: int = 6
    """Different digits."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """Of Adam; the largest at which GRPO's reward still doubles is used."""
    kl_coefficient: float = 0.04
    """Of the penalised GRPO."""
    format_reward: float = 1.0
    """For each format token in place; 10 more for the right digits in perfect format."""
    format_logit: float = 3.0
    """By which the format's tokens lead in the beginning."""
    quick: bool = False
    """A tiny version, for tests."""


def make_problem(config: Config) -> problems.TokenProblem:
    """Opening token, digits, closing token; whoever closes early or late has spoilt the format."""
    horizon = config.digits + 3  # room to close too late
    actions = FIRST_DIGIT + config.choices
    answers = FIRST_DIGIT + jax.random.randint(
        jax.random.key(30), (config.prompts, config.digits), 0, config.choices
    )

    def roles(tokens: Array) -> Array:
        closed = jnp.cumsum(tokens[:, 1:] == CLOSE, axis=1) - (tokens[:, 1:] == CLOSE) > 0
        found = jnp.where(closed, problems.NOBODY, problems.POLICY)
        return jnp.pad(found, ((0, 0), (1, 0)))

    def reward(tokens: Array) -> Array:
        opened = tokens[:, 1] == OPEN
        digits = tokens[:, 2 : 2 + config.digits]
        written = jnp.all(digits >= FIRST_DIGIT, axis=1)
        closed = written & (tokens[:, 2 + config.digits] == CLOSE)
        right = jnp.all(digits == answers[tokens[:, 0]], axis=1)
        in_place = config.format_reward * (opened * 1.0 + closed * 1.0)
        return in_place + (opened & closed & right) * 10.0

    def logits(params: Any, tokens: Array) -> Array:
        rows = params["shared"] + params["own"][tokens[:, 0]]
        return jnp.pad(rows, ((0, 0), (1, 0), (0, 0)))

    return problems.TokenProblem(
        num_prompts=config.prompts,
        num_actions=actions,
        horizon=horizon,
        logits=logits,
        reward=reward,
        roles=roles,
    )


def initial(config: Config, problem: problems.TokenProblem) -> dict[str, Array]:
    """Format likely, digits alike."""
    shape = (problem.horizon, problem.num_actions)
    shared = jnp.zeros(shape).at[0, OPEN].set(config.format_logit)
    shared = shared.at[1 : 1 + config.digits, FIRST_DIGIT:].set(config.format_logit)
    shared = shared.at[1 + config.digits :, CLOSE].set(config.format_logit)
    return {"shared": shared, "own": jnp.zeros((config.prompts, *shape))}


def measure(problem: problems.TokenProblem, digits: int, params: Any) -> dict[str, Array]:
    """Exact format rate and expected reward, positions being drawn independently; mean entropy."""
    tokens = jnp.zeros((problem.num_prompts, 1 + problem.horizon), jnp.int32)
    tokens = tokens.at[:, 0].set(jnp.arange(problem.num_prompts))
    logprobs = jax.nn.log_softmax(problem.logits(params, tokens)[:, 1:])
    p = jnp.exp(logprobs)
    written = jnp.prod(p[:, 1 : 1 + digits, FIRST_DIGIT:].sum(-1), axis=1)
    rate = p[:, 0, OPEN] * written * p[:, 1 + digits, CLOSE]
    entropy = -jnp.sum(p * logprobs, axis=-1)[:, : 2 + digits]
    return {"format": rate.mean(), "policy_entropy": entropy.mean()}


def methods(config: Config) -> dict[str, pg.Objective]:
    gtpo = token_selection.gtpo
    if config.quick:
        return {"GRPO": objectives.grpo(), "GTPO": gtpo()}
    return {
        "GRPO": objectives.grpo(),
        "GRPO with KL": objectives.grpo(kl_coefficient=config.kl_coefficient),
        "GTPO": gtpo(),
        "GTPO, no conflict weights": gtpo(boost=1.0, suppress=1.0),
        "GTPO, no gate": gtpo(threshold=float("inf")),
        "GTPO, no entropy term": gtpo(entropy_coefficient=0.0),
    }


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config, seeds=2, steps=6, warm_up=2, prompts=2, learning_rates=(0.1,)
        )
    problem = make_problem(config)

    def learn(objective: pg.Objective, rate: float, **options: Any) -> dict[str, np.ndarray]:
        return tabular.learn(
            problem,
            objective,
            optax.adam(rate),
            init=lambda key: initial(config, problem),
            measure=lambda params: measure(problem, config.digits, params),
            group_size=config.group_size,
            steps=config.steps,
            seeds=config.seeds,
            fixed_reference=True,
            **options,
        )

    tuning = {
        rate: learn(objectives.grpo(), rate, first_seed=1000)["reward"]
        for rate in reproduction.track(config.learning_rates, "learning rates")
    }
    learns = [
        rate for rate, x in tuning.items() if x[:, -20:].mean() >= 2 * x[:, :5].mean()
    ] or list(tuning)
    rate = max(learns)
    found = {
        name: learn(objective, rate)
        for name, objective in reproduction.track(methods(config).items())
    }
    table = {
        name: {
            "lowest format rate": x["format"][:, config.warm_up :].min(1),
            "final format rate": x["final/format"],
            "final reward": x["reward"][:, -20:].mean(1),
            "highest entropy": x["policy_entropy"][:, config.warm_up :].max(1),
            "final entropy": x["final/policy_entropy"],
        }
        for name, x in found.items()
    }
    grpo, gtpo = found["GRPO"], found["GTPO"]
    lowest, other = (x["format"][:, config.warm_up :].min(1) for x in (gtpo, grpo))
    drop = float(np.mean(np.maximum.accumulate(grpo["format"], axis=1).max(1) - other))
    start = float(gtpo["policy_entropy"][:, 0].mean())
    highest = float(gtpo["policy_entropy"][:, config.warm_up :].max())
    claims = [
        reproduction.Claim(
            f"GRPO without KL loses format at learning rate {rate}",
            drop >= 0.1,
            f"{drop:.3f} below its best (at least 0.100)",
        ),
        reproduction.Claim(
            "GTPO's lowest format rate is not below GRPO's",
            bool(lowest.mean() >= other.mean()),
            f"{lowest.mean():.3f} against {other.mean():.3f}",
        ),
        reproduction.Claim(
            "GTPO's entropy does not rise above where it began",
            highest <= start,
            f"{highest:.3f} at most, {start:.3f} in the beginning",
        ),
    ]
    steps = np.arange(config.steps)
    return reproduction.Findings(
        title=f"Answers in a fixed format, Adam at {rate}",
        table=table,
        claims=claims,
        panels={
            title: {name: reproduction.band(steps, x[column]) for name, x in found.items()}
            for title, column in (
                ("format rate", "format"),
                ("reward", "reward"),
                ("entropy", "policy_entropy"),
            )
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main("gtpo_format", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
