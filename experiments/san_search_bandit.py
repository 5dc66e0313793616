"""Comparing like with like: what Stratified GRPO adds to GRPO on a search bandit.

An agent first chooses how often to search (0, 1 or 2 times), then one of ten answers. Without a
search any answer is right half the time; with one, a single answer is right with probability 0.7
and the others with 0.1; with two, a single one with 0.95 and the others never. At first searching
looks bad, because the right answer is not known yet.

GRPO holds searchers against those who did not search and unlearns searching. Normalising within
the number of searches (SAN), blended with GRPO, must end at least 0.3 higher in expected reward
than GRPO at its best learning rate; SAN alone must leave the choice of searches where it was
(arXiv 2510.06214). Exits with 1 if that does not show.
"""

from __future__ import annotations

import dataclasses
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
from pgjax.diagnostics import problems
from pgjax.objectives import stratified

ARMS = 10
SEARCHES = 3
BLEND = 0.8


@dataclasses.dataclass(frozen=True)
class Config:
    """Stratified GRPO with several blends, and GRPO with several learning rates."""

    alphas: tuple[float, ...] = (0.5, BLEND, 0.9, 1.0)
    """Weights of the stratified term; must contain 0.8 and 1, which the claims are about."""
    learning_rate: float = 1.0
    """Of SGD. A sequence's loss is the mean over its two tokens."""
    grpo_learning_rates: tuple[float, ...] = (0.25, 1.0, 4.0)
    """GRPO is run with each; the best one is compared."""
    group_size: int = 16
    """Samples a step."""
    steps: int = 600
    """Updates of every run."""
    seeds: int = 20
    """Independent runs of every method."""
    out: pathlib.Path = pathlib.Path("runs/san_search_bandit")
    """Directory for the results."""
    quick: bool = False
    """A tiny version that shows nothing but that it runs."""


def success() -> np.ndarray:
    """Probability of a right answer by number of searches and arm."""
    table = np.full((SEARCHES, ARMS), 0.5)
    table[1], table[2] = 0.1, 0.0
    table[1, 3], table[2, 7] = 0.7, 0.95
    return table


def search_problem() -> problems.TokenProblem:
    """Tokens: number of searches, arm, whether it was right."""
    right = jnp.asarray(success(), jnp.float32)

    def roles(tokens: Array) -> Array:
        row = jnp.array([problems.NOBODY, problems.POLICY, problems.POLICY, problems.NATURE])
        return jnp.broadcast_to(row, tokens.shape)

    def logits(params: dict[str, Array], tokens: Array) -> Array:
        arms = params["arms"][tokens[:, 1] % SEARCHES]
        none = jnp.full(ARMS - SEARCHES, -1e9)
        searches = jnp.broadcast_to(jnp.concatenate([params["searches"], none]), arms.shape)
        return jnp.stack([jnp.zeros_like(arms), searches, arms, jnp.zeros_like(arms)], axis=1)

    def nature(tokens: Array) -> Array:
        p = right[tokens[:, 1] % SEARCHES, tokens[:, 2]]
        outcome = jnp.stack([1 - p, p, *[jnp.zeros_like(p)] * (ARMS - 2)], axis=-1)
        return jnp.broadcast_to(outcome[:, None], (*tokens.shape, ARMS))

    return problems.TokenProblem(
        num_prompts=1,
        num_actions=ARMS,
        horizon=3,
        logits=logits,
        reward=lambda tokens: tokens[:, 3].astype(jnp.float32),
        roles=roles,
        nature=nature,
        extras=lambda tokens: {"strata": tokens[:, 1]},
    )


def measure(params: dict[str, Array]) -> dict[str, Array]:
    """Expected reward and the probability of each number of searches, exactly."""
    searches = jax.nn.softmax(params["searches"])
    arms = jax.nn.softmax(params["arms"])
    value = (arms * jnp.asarray(success())).sum(-1)
    return {
        "expected reward": searches @ value,
        "P(2 searches)": searches[2],
        "moved": jnp.max(jnp.abs(searches - 1 / SEARCHES)),
    }


def run(config: Config) -> reproduction.Findings:
    if not {BLEND, 1.0} <= set(config.alphas):
        raise ValueError(f"alphas: expected {BLEND} and 1.0 among them, got {config.alphas}")
    if config.quick:
        config = dataclasses.replace(
            config, alphas=(BLEND, 1.0), grpo_learning_rates=(1.0,), steps=20, seeds=2
        )
    start = {"searches": jnp.zeros(SEARCHES), "arms": jnp.zeros((SEARCHES, ARMS))}
    every = max(config.steps // 60, 1)

    def learn(objective: pg.Objective, rate: float) -> dict[str, np.ndarray]:
        return tabular.learn(
            search_problem(),
            objective,
            optax.sgd(rate),
            init=lambda key: start,
            measure=measure,
            group_size=config.group_size,
            steps=config.steps,
            seeds=config.seeds,
            every=every,
        )

    plain = pg.objectives.grpo(ddof=0, epsilon=1e-8)
    curves = {
        f"GRPO, lr {rate:g}": learn(plain, rate)
        for rate in reproduction.track(config.grpo_learning_rates, "GRPO")
    }
    best = max(curves, key=lambda name: curves[name]["final/expected reward"].mean())
    for alpha in reproduction.track(config.alphas, "SAN"):
        objective = stratified.stratified_grpo(
            alpha=alpha, strata=lambda rollout: (rollout.extras or {})["strata"]
        )
        curves[f"SAN, α = {alpha:g}"] = learn(objective, config.learning_rate)
    blended, pure = curves[f"SAN, α = {BLEND:g}"], curves["SAN, α = 1"]
    columns = ("expected reward", "P(2 searches)")
    steps = np.arange(0, config.steps, every)
    return reproduction.Findings(
        title="Stratified GRPO on the search bandit",
        table={
            name: {column: found[f"final/{column}"] for column in columns}
            for name, found in curves.items()
        },
        claims=[
            reproduction.above(
                f"expected reward, α = {BLEND:g} minus the best GRPO ({best})",
                blended["final/expected reward"] - curves[best]["final/expected reward"],
                0.3,
            ),
            reproduction.above(
                f"expected reward, α = {BLEND:g} minus SAN alone",
                blended["final/expected reward"] - pure["final/expected reward"],
                0.1,
            ),
            _at_most(
                "SAN alone: largest move of a probability of searching",
                float(pure["final/moved"].max()),
                0.01,
            ),
        ],
        panels={
            column: {
                name: reproduction.band(steps, found[column]) for name, found in curves.items()
            }
            for column in columns
        },
    )


def _at_most(text: str, value: float, threshold: float) -> reproduction.Claim:
    return reproduction.Claim(text, value <= threshold, f"{value:.4f} (at most {threshold:g})")


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "san_search_bandit", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
