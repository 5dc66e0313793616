"""How many ways to be right remain: G2RL against GRPO where ten answers are correct.

A policy writes two digits whose sum must end in 7, so there are ten right answers. GRPO settles on
one of them. With rewards shaped by how new a sample's score direction is among its group (G2RL),
the effective number of right answers in use (the exponential of their entropy) must be at least
1.5 times GRPO's with a success rate of at least 0.98, and pairs of samples with opposed score
directions must be more frequent (arXiv 2512.15687). Exits with 1 if that does not show. GRPO with
several entropy bonuses, other forms of the shaped reward, and other features are shown beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import pgjax as pg
from experiments.shared import reproduction, tabular
from pgjax.advantages import novelty
from pgjax.diagnostics import problems
from pgjax.objectives import stratified

DIGITS = 10
TARGET = 7


@dataclasses.dataclass(frozen=True)
class Config:
    """G2RL in its three forms and with other features, GRPO, GRPO with entropy bonuses."""

    strength: float = 0.5
    """λ of the shaped rewards."""
    entropy_coefficients: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Of GRPO's entropy bonuses."""
    learning_rate: float = 4.0
    """Of SGD. A sequence's loss is the mean over its two tokens."""
    group_size: int = 16
    """Samples a step."""
    steps: int = 400
    """Updates of every run."""
    seeds: int = 10
    """Independent runs of every method."""
    out: pathlib.Path = pathlib.Path("runs/g2rl_modes")
    """Directory for the results."""
    quick: bool = False
    """A tiny version that shows nothing but that it runs."""


def digit_problem() -> problems.TokenProblem:
    """Two digits; right if their sum ends in 7."""

    def logits(params: dict[str, Array], tokens: Array) -> Array:
        second = params["second"][tokens[:, 1]]
        first = jnp.broadcast_to(params["first"], second.shape)
        return jnp.stack([jnp.zeros_like(first), first, second], axis=1)

    return problems.TokenProblem(
        num_prompts=1,
        num_actions=DIGITS,
        horizon=2,
        logits=logits,
        reward=lambda tokens: ((tokens[:, 1] + tokens[:, 2]) % DIGITS == TARGET) * 1.0,
    )


def measure(
    params: dict[str, Array], *, problem: problems.TokenProblem, tokens: Array
) -> dict[str, Array]:
    """Success, effective number of right answers, frequency of opposed pairs: all exact."""
    probability = jnp.exp(problems.log_probability(problem, params, tokens))
    right = probability * problem.reward(tokens)
    shares = right / jnp.maximum(right.sum(), 1e-30)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.maximum(shares, 1e-30)), 0.0))
    rollout = problems.rollout_of(problem, tokens, params)
    found = problems.outputs(problem, params, rollout, frozenset({"score_features"}))
    cosine_sign = found.score_features @ found.score_features.T
    return {
        "success": right.sum(),
        "right answers in use": jnp.exp(entropy),
        "opposed pairs": probability @ (cosine_sign < 0) @ probability,
    }


def methods(config: Config) -> dict[str, pg.Objective]:
    """What is compared; rewards of GRPO are ±1 as well, which its normalisation cancels."""
    g2rl = functools.partial(stratified.g2rl, strength=config.strength)
    plain = pg.objectives.grpo(ddof=0)

    def digits(rollout: pg.Rollout) -> Array:
        return jax.nn.one_hot(rollout.tokens[:, 1:], DIGITS).mean(1)

    if config.quick:
        return {"GRPO": plain, "G2RL": g2rl()}
    return {
        "GRPO": plain,
        **{
            f"GRPO, entropy bonus {x:g}": dataclasses.replace(
                plain, regularizers=(pg.objectives.entropy_bonus(x),)
            )
            for x in config.entropy_coefficients
        },
        "G2RL": g2rl(),
        "G2RL, printed form": g2rl(shape=novelty.printed_novelty_reward, without_spread=0.0),
        "G2RL, scaled form": g2rl(shape=novelty.scaled_novelty_reward, without_spread=0.0),
        "G2RL, features = digits": g2rl(features=digits),
    }


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, steps=10, seeds=2)
    every = max(config.steps // 40, 1)
    start = {"first": jnp.zeros(DIGITS), "second": jnp.zeros((DIGITS, DIGITS))}
    problem = digit_problem()
    every_answer = jnp.asarray(problems.all_sequences(problem))
    curves = {
        name: tabular.learn(
            problem,
            objective,
            optax.sgd(config.learning_rate),
            init=lambda key: start,
            measure=functools.partial(measure, problem=problem, tokens=every_answer),
            group_size=config.group_size,
            steps=config.steps,
            seeds=config.seeds,
            every=every,
        )
        for name, objective in reproduction.track(methods(config).items())
    }
    columns = ("success", "right answers in use", "opposed pairs")
    steps = np.arange(0, config.steps, every)

    def final(name: str, column: str) -> np.ndarray:
        return curves[name][f"final/{column}"]

    modes = "right answers in use"
    ratio = float(final("G2RL", modes).mean() / final("GRPO", modes).mean())
    return reproduction.Findings(
        title="G2RL where ten answers are right",
        table={
            name: {column: final(name, column) for column in columns}
            | {"opposed pairs, mean of all steps": found["opposed pairs"].mean(1)}
            for name, found in curves.items()
        },
        claims=[
            reproduction.Claim(
                "right answers in use, G2RL over GRPO", ratio >= 1.5, f"{ratio:.2f} (at least 1.5)"
            ),
            reproduction.above("success of G2RL", final("G2RL", "success"), 0.98),
            reproduction.Claim(
                "opposed pairs more frequent at the end than with GRPO",
                final("G2RL", "opposed pairs").mean() > final("GRPO", "opposed pairs").mean(),
                f"{final('G2RL', 'opposed pairs').mean():.3f} against "
                f"{final('GRPO', 'opposed pairs').mean():.3f}",
            ),
        ],
        panels={
            column: {
                name: reproduction.band(steps, found[column]) for name, found in curves.items()
            }
            for column in columns
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main("g2rl_modes", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
