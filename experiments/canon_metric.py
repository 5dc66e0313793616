"""Amplifying a metric without choosing its direction: CANON where long answers help and hurt.

Sixteen prompts, answers of length 1 to 6. On hard prompts accuracy rises with length from 0.1 to
0.7, on easy ones it falls from 0.8 to 0.6. A bonus for length has to choose; comparing the longer
half of each group with the shorter one (CANON, μ = 1) does not.

Split by length it must beat the same estimator split at random by 0.05 in hard accuracy early on,
and end with easy accuracy within 0.01 of Dr. GRPO's, where the length bonus loses more; and
discounting the longer half's rewards must shorten answers, hard accuracy staying above its start
(arXiv 2509.23962). Exits with 1 if that does not show. Dr. GRPO at twice the learning rate is shown
beside them: in a table, amplification is much like a larger step.
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

HARD = np.linspace(0.1, 0.7, 6)
EASY = np.linspace(0.8, 0.6, 6)


@dataclasses.dataclass(frozen=True)
class Config:
    """CANON by length, by chance and within halves, Dr. GRPO, and a bonus for length."""

    prompts: int = 16
    """Half of them hard."""
    group_size: int = 16
    """Samples per prompt and step."""
    learning_rate: float = 10.0
    """Of SGD; the loss is a mean over all prompts, each of which has its own parameters."""
    bonus: float = 0.3
    """Reward of the longest answer over the shortest, for the method that has one."""
    discounts: tuple[float, ...] = (0.5, 0.8)
    """Of the longer half's rewards, beside 1."""
    early: int = 25
    """Step at which speed is compared; `steps` is a multiple of it."""
    steps: int = 200
    """Updates of every run."""
    seeds: int = 6
    """Independent runs of every method."""
    out: pathlib.Path = pathlib.Path("runs/canon_metric")
    """Directory for the results."""
    quick: bool = False
    """A tiny version that shows nothing but that it runs."""


def length_problem(prompts: int) -> problems.TokenProblem:
    """Tokens: length less one, whether the answer was right. Even prompts are hard."""
    right = accuracy(prompts)

    def roles(tokens: Array) -> Array:
        row = jnp.array([problems.NOBODY, problems.POLICY, problems.NATURE])
        return jnp.broadcast_to(row, tokens.shape)

    def logits(params: Array, tokens: Array) -> Array:
        rows = params[tokens[:, 0]]
        return jnp.stack([jnp.zeros_like(rows), rows, jnp.zeros_like(rows)], axis=1)

    def nature(tokens: Array) -> Array:
        p = right[tokens[:, 0], tokens[:, 1]]
        outcome = jnp.stack([1 - p, p, *[jnp.zeros_like(p)] * (right.shape[1] - 2)], axis=-1)
        return jnp.broadcast_to(outcome[:, None], (*tokens.shape, right.shape[1]))

    return problems.TokenProblem(
        num_prompts=prompts,
        num_actions=right.shape[1],
        horizon=2,
        logits=logits,
        reward=lambda tokens: tokens[:, 2].astype(jnp.float32),
        roles=roles,
        nature=nature,
        extras=lambda tokens: {"length": tokens[:, 1] + 1},
    )


def accuracy(prompts: int) -> Array:
    """Probability of a right answer by prompt and length."""
    hard = np.arange(prompts)[:, None] % 2 == 0
    return jnp.asarray(np.where(hard, HARD, EASY), jnp.float32)


def answer_length(rollout: pg.Rollout) -> Array:
    return (rollout.extras or {})["length"]


def methods(config: Config) -> dict[str, pg.Objective]:
    """What is compared, all with clipping as in CANON and tokens summed over a length of 1."""
    plain = pg.objectives.dr_grpo(length=1, high=0.28)

    def with_bonus(rollout: pg.Rollout) -> Array:
        return rollout.rewards + config.bonus * (answer_length(rollout) - 1) / (len(HARD) - 1)

    by_length = {
        f"CANON by length, α = {x:g}": stratified.canon(
            length=1, metric=answer_length, high_discount=x
        )
        for x in (1.0, *config.discounts)
    }
    found = {
        "Dr. GRPO": plain,
        **by_length,
        "CANON, random halves": stratified.canon(
            length=1, metric=lambda rollout: jnp.arange(rollout.rewards.shape[0])
        ),
        "length bonus": dataclasses.replace(plain, rewards=with_bonus),
    }
    if not config.quick:
        found["CANON, within halves"] = stratified.canon(length=1, metric=answer_length, mix=0.0)
    return found


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, discounts=(), early=5, steps=10, seeds=2)
    right = accuracy(config.prompts)

    def measure(params: Array) -> dict[str, Array]:
        p = jax.nn.softmax(params)
        by_prompt, length = (p * right).sum(-1), p @ jnp.arange(1.0, right.shape[1] + 1)
        return {
            "hard accuracy": by_prompt[::2].mean(),
            "easy accuracy": by_prompt[1::2].mean(),
            "hard length": length[::2].mean(),
            "easy length": length[1::2].mean(),
        }

    def learn(objective: pg.Objective, rate: float) -> dict[str, np.ndarray]:
        return tabular.learn(
            length_problem(config.prompts),
            objective,
            optax.sgd(rate),
            init=lambda key: jnp.zeros(right.shape),
            measure=measure,
            group_size=config.group_size,
            steps=config.steps,
            seeds=config.seeds,
            every=every,
        )

    every = max(config.early // 5, 1)
    curves = {
        name: learn(objective, config.learning_rate)
        for name, objective in reproduction.track(methods(config).items())
    }
    if not config.quick:
        curves["Dr. GRPO, lr × 2"] = learn(methods(config)["Dr. GRPO"], 2 * config.learning_rate)

    def early(name: str) -> np.ndarray:
        return curves[name]["hard accuracy"][:, config.early // every]

    def final(name: str, column: str) -> np.ndarray:
        return curves[name][f"final/{column}"]

    def loss(name: str) -> float:
        easy = final("Dr. GRPO", "easy accuracy") - final(name, "easy accuracy")
        return float(easy.mean())

    canon, names = (
        "CANON by length, α = 1",
        [f"CANON by length, α = {x:g}" for x in sorted({1.0, *config.discounts})],
    )
    lengths = [
        float(np.mean(final(name, "hard length") + final(name, "easy length")) / 2)
        for name in names
    ]
    short = names[0]
    start = float(HARD.mean())
    columns = ("hard accuracy", "easy accuracy", "hard length", "easy length")
    steps = np.arange(0, config.steps, every)
    return reproduction.Findings(
        title="CANON where the useful direction of length depends on the prompt",
        table={
            name: {f"hard accuracy, step {config.early}": early(name)}
            | {column: final(name, column) for column in columns}
            for name in curves
        },
        claims=[
            reproduction.above(
                f"hard accuracy at step {config.early}, halves by length minus random halves",
                early(canon) - early("CANON, random halves"),
                0.05,
            ),
            reproduction.Claim(
                "easy accuracy below Dr. GRPO's at the end, halves by length",
                loss(canon) <= 0.01,
                f"{loss(canon):.3f} (at most 0.01)",
            ),
            reproduction.Claim(
                "the same for the length bonus",
                loss("length bonus") > 0.01,
                f"{loss('length bonus'):.3f} (more than 0.01)",
            ),
            reproduction.Claim(
                "a smaller α, shorter answers",
                bool(np.all(np.diff(lengths) > 0)),
                ", ".join(f"{x:.2f}" for x in lengths),
            ),
            reproduction.above(
                f"hard accuracy over its start of {start:.2f}, {short}",
                final(short, "hard accuracy") - start,
                0.0,
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
    return reproduction.main("canon_metric", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
