"""CAPO: does rejecting a few tokens keep training stable where GRPO collapses?

The linear policy and task of `capo_diagnostic`: malformed completions score 0, so a step too far
can end all reward and with it all learning. The learning rate of plain gradient descent is swept;
two passes are made over each batch. Compared: GRPO, GRPO with a narrow clip, GRPO with a strong KL
penalty, CAPO with one pair of limits at all learning rates, and CAPO with limits that grow with the
step (the gain's in proportion, the shift's with its square).

A run has collapsed if its final reward is below 20% of its best. Exits 1 unless at some learning
rate most of GRPO's runs collapse and most of scaled CAPO's do not while it rejects below 10% of the
tokens. Learning rates at which CAPO rejects more than half are reported: there it has frozen.
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
from experiments import capo_diagnostic as task
from experiments.shared import reproduction, tabular
from pgjax import objectives
from pgjax.diagnostics import problems


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    out: pathlib.Path = pathlib.Path("runs/capo_stability")
    """Where results go."""
    seeds: int = 5
    """Independent runs of every method and learning rate."""
    steps: int = 150
    """Batches."""
    group_size: int = 4
    """Samples of each prompt."""
    base_rate: float = 3.0
    """Learning rate 1x, of plain gradient descent."""
    factors: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    """The sweep."""
    narrow: float = 0.05
    """Clip width of the narrow GRPO."""
    kl_coefficient: float = 1.0
    """Of the penalised GRPO."""
    gain_limit: float = 15.0
    """Of CAPO, at 1x."""
    shift_limit: float = 12.0
    """Of CAPO, at 1x: such that it rejects few tokens there."""
    quick: bool = False
    """A tiny version, for tests."""


def methods(config: Config, factor: float) -> dict[str, pg.Objective]:
    capo, rate = objectives.capo, factor * config.base_rate
    found = {
        "GRPO": objectives.grpo(),
        "narrow clip": objectives.grpo(low=config.narrow, high=config.narrow),
        "KL penalty": objectives.grpo(kl_coefficient=config.kl_coefficient),
        "CAPO": capo(
            learning_rate=rate, gain_limit=config.gain_limit, shift_limit=config.shift_limit
        ),
        "CAPO, scaled": capo(
            learning_rate=rate,
            gain_limit=config.gain_limit * factor,
            shift_limit=config.shift_limit * factor**2,
        ),
    }
    names = ("GRPO", "CAPO", "CAPO, scaled") if config.quick else found
    return {name: found[name] for name in names}


def rejected(
    problem: problems.TokenProblem, objective: pg.Objective, group_size: int, params: Array
) -> Array:
    """Share of a batch's tokens with an advantage that the objective's mask leaves out."""
    rollout = problems.sample(problem, params, jax.random.key(41), group_size=group_size)
    old = problems.outputs(problem, params, rollout, objective.old_needs)
    prepared = objective.prepare(rollout.replace(old=old))
    assert prepared.advantages is not None
    given = rollout.mask & (prepared.advantages != 0)[:, None]
    return jnp.sum(given & ~prepared.mask) / jnp.maximum(jnp.sum(given), 1)


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, seeds=2, steps=4, factors=(1.0,))
    problem = task.make_problem()
    found: dict[str, dict[float, dict[str, np.ndarray]]] = {}
    for factor in reproduction.track(config.factors):
        for name, objective in methods(config, factor).items():

            def measure(params: Array, objective: pg.Objective = objective) -> dict[str, Array]:
                share = rejected(problem, objective, config.group_size, params)
                return {"rejected": share}

            found.setdefault(name, {})[factor] = tabular.learn(
                problem,
                objective,
                optax.sgd(factor * config.base_rate),
                init=lambda key: task.initial(),
                measure=measure,
                group_size=config.group_size,
                steps=config.steps,
                seeds=config.seeds,
                every=2,
                fixed_reference=True,
                num_epochs=2,
            )
    table = {
        f"{name} {factor:g}x": {
            "best reward": reproduction.smooth(x["reward"]).max(1),
            "final reward": reproduction.smooth(x["reward"])[:, -1],
            "collapsed": collapsed(x["reward"]),
            "rejected": x["rejected"].mean(1),
        }
        for name, by_factor in found.items()
        for factor, x in by_factor.items()
    }
    saved = [
        factor
        for factor in config.factors
        if table[f"GRPO {factor:g}x"]["collapsed"].mean() > 0.5
        and table[f"CAPO, scaled {factor:g}x"]["collapsed"].mean() < 0.5
        and table[f"CAPO, scaled {factor:g}x"]["rejected"].mean() < 0.1
    ]
    frozen = [
        f"{name} {factor:g}x"
        for name in ("CAPO", "CAPO, scaled")
        for factor in config.factors
        if table[f"{name} {factor:g}x"]["rejected"].mean() > 0.5
    ]
    fallen = [f for f in config.factors if table[f"GRPO {f:g}x"]["collapsed"].mean() > 0.5]
    claims = [
        reproduction.Claim(
            "some learning rate makes most runs of GRPO collapse",
            bool(fallen),
            ", ".join(f"{f:g}x" for f in fallen) or "none does",
        ),
        reproduction.Claim(
            "at one of them scaled CAPO stays up and rejects less than a tenth",
            bool(saved),
            ", ".join(f"{f:g}x" for f in saved) or "at none",
        ),
        reproduction.Claim(
            "CAPO never rejects most tokens", not frozen, ", ".join(frozen) or "nowhere"
        ),
    ]
    return reproduction.Findings(
        title="Stability over learning rates",
        table=table,
        claims=claims,
        panels={
            f"reward at {factor:g}x": {
                name: reproduction.band(np.arange(0, config.steps, 2), by_factor[factor]["reward"])
                for name, by_factor in found.items()
            }
            for factor in config.factors
        },
    )


def collapsed(rewards: np.ndarray) -> np.ndarray:
    """1 for runs that end below a fifth of their best."""
    curve = reproduction.smooth(rewards)
    return (curve[:, -1] < 0.2 * curve.max(1)).astype(float)


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "capo_stability", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
