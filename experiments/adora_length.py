"""Do ADORA's weights teach long answers to hard prompts faster than the same weights by chance?

Prompts are answered at length 1 to 6. On hard ones accuracy rises with length from 0.1 to 0.7, on
easy ones it is 0.8 throughout and nothing is to be learnt. ADORA doubles the advantages of prompts
where success is rare and longer than failure (or divides those of the others by ten). A control
gives the very same weights to prompts drawn by chance, so that it differs in nothing else, the
mean step included.

Two settings: every prompt with parameters of its own, and a few hard prompts that share all
parameters with many easy ones, whose noise they have to overcome. In both, the length of answers
to hard prompts after a few steps must exceed the control's by more than two standard errors
(arXiv 2602.10019, whose figures are of vision and text models). Exits with 1 if that does not show.
GRPO at twice the learning rate is shown beside them: here, where nothing is to be learnt on easy
prompts, larger steps do the same.
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
from pgjax.advantages import reweight
from pgjax.diagnostics import problems
from pgjax.objectives import stratified

HARD = np.linspace(0.1, 0.7, 6)
EASY = 0.8
NO_LIMIT = 7.0  # no answer is cut off
SETTINGS = ("own parameters", "shared parameters")
PAIRS = (("ADORA", "by chance"), ("ADORA, attenuating", "by chance, attenuating"))


@dataclasses.dataclass(frozen=True)
class Config:
    """ADORA that amplifies and that attenuates, controls by chance, GRPO with two step sizes."""

    hard: int = 4
    """Hard prompts."""
    easy: int = 12
    """Easy prompts."""
    group_size: int = 16
    """Samples per prompt and step."""
    own_learning_rate: float = 4.0
    """Of SGD where each prompt has its own parameters; the loss is a mean over prompts."""
    shared_learning_rate: float = 1.0
    """Of SGD where all prompts share theirs."""
    early: int = 15
    """Step at which lengths are compared."""
    steps: int = 40
    """Updates of every run."""
    seeds: int = 8
    """Independent runs of every method."""
    out: pathlib.Path = pathlib.Path("runs/adora_length")
    """Directory for the results."""
    quick: bool = False
    """A tiny version that shows nothing but that it runs."""


def length_problem(config: Config, *, shared: bool) -> problems.TokenProblem:
    """Tokens: length less one, whether the answer was right. The first prompts are hard."""
    right = jnp.asarray(
        np.where(np.arange(config.hard + config.easy)[:, None] < config.hard, HARD, EASY),
        jnp.float32,
    )

    def roles(tokens: Array) -> Array:
        row = jnp.array([problems.NOBODY, problems.POLICY, problems.NATURE])
        return jnp.broadcast_to(row, tokens.shape)

    def logits(params: Array, tokens: Array) -> Array:
        rows = params[jnp.zeros_like(tokens[:, 0]) if shared else tokens[:, 0]]
        return jnp.stack([jnp.zeros_like(rows), rows, jnp.zeros_like(rows)], axis=1)

    def nature(tokens: Array) -> Array:
        p = right[tokens[:, 0], tokens[:, 1]]
        outcome = jnp.stack([1 - p, p, *[jnp.zeros_like(p)] * (HARD.size - 2)], axis=-1)
        return jnp.broadcast_to(outcome[:, None], (*tokens.shape, HARD.size))

    return problems.TokenProblem(
        num_prompts=config.hard + config.easy,
        num_actions=HARD.size,
        horizon=2,
        logits=logits,
        reward=lambda tokens: tokens[:, 2].astype(jnp.float32),
        roles=roles,
        nature=nature,
        extras=lambda tokens: {"length": tokens[:, 1] + 1},
    )


def methods(config: Config) -> dict[str, pg.Objective]:
    def lengths(rollout: pg.Rollout) -> Array:
        return (rollout.extras or {})["length"]

    def by_chance(utility: reweight.RolloutUtility) -> Array:
        """ADORA's choice of groups, dealt out anew; the batch's own lengths are the dice."""
        groups = config.hard + config.easy
        chosen = stratified.rare_and_longer(utility)
        dice = jnp.sum(utility.mean_failure[:groups] * 7919).astype(jnp.int32)
        dealt = jax.random.permutation(jax.random.key(dice), chosen[:groups])
        return chosen.at[:groups].set(dealt)

    weighted = functools.partial(stratified.adora, max_length=NO_LIMIT, lengths=lengths)
    attenuated = functools.partial(weighted, low_weight=0.1, high_weight=1.0)
    if config.quick:
        return {"ADORA": weighted(), "by chance": weighted(advantageous=by_chance)}
    return {
        "GRPO": pg.objectives.grpo(),
        "ADORA": weighted(),
        "by chance": weighted(advantageous=by_chance),
        "ADORA, attenuating": attenuated(),
        "by chance, attenuating": attenuated(advantageous=by_chance),
        "ADORA, attenuating by length alone": attenuated(rate=1.0),
    }


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, early=3, steps=6, seeds=2)

    def measure(params: Array) -> dict[str, Array]:
        p = jax.nn.softmax(params)[: config.hard]
        return {
            "hard accuracy": (p @ jnp.asarray(HARD)).mean(),
            "hard length": (p @ jnp.arange(1.0, HARD.size + 1)).mean(),
        }

    def learn(objective: pg.Objective, *, shared: bool, scale: float) -> dict[str, np.ndarray]:
        rate = config.shared_learning_rate if shared else config.own_learning_rate
        rows = 1 if shared else config.hard + config.easy
        return tabular.learn(
            length_problem(config, shared=shared),
            objective,
            optax.sgd(rate * scale),
            init=lambda key: jnp.zeros((rows, HARD.size)),
            measure=measure,
            group_size=config.group_size,
            steps=config.steps,
            seeds=config.seeds,
        )

    table: dict[str, dict[str, np.ndarray]] = {}
    panels: dict[str, dict[str, tuple]] = {}
    claims = []
    for setting in reproduction.track(SETTINGS[-1:] if config.quick else SETTINGS):
        shared = setting == "shared parameters"
        curves = {
            name: learn(objective, shared=shared, scale=1.0)
            for name, objective in methods(config).items()
        }
        if not config.quick:
            curves["GRPO, lr × 2"] = learn(methods(config)["GRPO"], shared=shared, scale=2.0)
        for name, found in curves.items():
            table[f"{setting}: {name}"] = _row(found, config)
        for name, control in PAIRS[:1] if config.quick else PAIRS:
            claims.append(
                _longer(
                    f"{setting}: length on hard prompts at step {config.early}, {name} minus "
                    "the same weights by chance",
                    curves[name]["hard length"][:, config.early],
                    curves[control]["hard length"][:, config.early],
                )
            )
        panels[f"length on hard prompts, {setting}"] = {
            name: reproduction.band(np.arange(config.steps), found["hard length"])
            for name, found in curves.items()
        }
    return reproduction.Findings(
        title="ADORA's weights against the same weights by chance",
        table=table,
        claims=claims,
        panels=panels,
    )


def _row(found: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    reached = found["hard accuracy"] >= 0.9 * HARD.max()
    steps = np.where(reached.any(1), reached.argmax(1), config.steps)
    return {
        f"hard length, step {config.early}": found["hard length"][:, config.early],
        f"hard accuracy, step {config.early}": found["hard accuracy"][:, config.early],
        f"steps to 90% of the best ({config.steps}: not reached)": steps.astype(float),
        "hard accuracy": found["final/hard accuracy"],
        "advantage magnitude": found["advantage_magnitude"].mean(1),
    }


def _longer(text: str, found: np.ndarray, control: np.ndarray) -> reproduction.Claim:
    difference = float(found.mean() - control.mean())
    error = float(np.sqrt(found.var(ddof=1) / found.size + control.var(ddof=1) / control.size))
    return reproduction.Claim(
        text, difference > 2 * error, f"{difference:.3f} (more than {2 * error:.3f})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main("adora_length", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
