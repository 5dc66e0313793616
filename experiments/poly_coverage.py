"""Rewarding samples in sets keeps several ways of succeeding alive (polychromic objectives).

A bandit whose right arm depends on a configuration that the policy cannot see: one of four, with
frequencies .5, .25, .15 and .1. The best policy for single samples always takes the first arm. Sets
scored by mean reward times diversity must raise pass@16 by at least .2 over the mean baseline, at a
better pass@1 than an entropy bonus of any strength with the same pass@16 (arXiv 2509.25424).
Everything but the advantage and the bonus is the same. Exits with 1 if that does not show.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.shared import reproduction, tabular
from pgjax import advantages, objectives
from pgjax.diagnostics import problems
from pgjax.objectives import baselines

SHARES = (10, 5, 3, 2)  # of 20 prompts have configuration 0, 1, 2, 3
CONFIGURATIONS = np.repeat(np.arange(4), SHARES)
FREQUENCIES = np.array(SHARES) / sum(SHARES)
BUDGETS = (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class Config:
    """A bandit with hidden configurations."""

    seeds: int = 8
    """Runs of every method."""
    steps: int = 400
    """Updates."""
    learning_rate: float = 0.3
    """Of plain gradient descent, the same for all."""
    arms: int = 10
    """Actions; four of them are ever right."""
    group_size: int = 8
    """Samples per prompt and step."""
    set_sizes: tuple[int, ...] = (2, 4, 6)
    """Samples of a set; all subsets are scored. The claims are about sets of 4."""
    bonuses: tuple[float, ...] = (0.03, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)
    """Coefficients of the entropy bonus on the mean baseline."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/poly_coverage")
    """Directory for table and plot."""


def hidden_bandit(arms: int) -> problems.TokenProblem:
    """The policy's logits `[A]` are the same for every prompt."""
    right = jnp.asarray(CONFIGURATIONS)
    return problems.TokenProblem(
        num_prompts=len(CONFIGURATIONS),
        num_actions=arms,
        horizon=1,
        logits=lambda params, tokens: jnp.broadcast_to(params, (*tokens.shape, arms)),
        reward=lambda tokens: (tokens[:, 1] == right[tokens[:, 0]]).astype(jnp.float32),
    )


def coverage(params: Float[Array, " A"]) -> dict[str, Array]:
    """Exact pass@k: the chance that one of k samples is right."""
    hit = jax.nn.softmax(params)[:4]
    return {f"pass@{k}": jnp.asarray(FREQUENCIES) @ (1 - (1 - hit) ** k) for k in BUDGETS}


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, seeds=3, steps=20, set_sizes=(4,), bonuses=(0.1, 1.0))
    in_sets = {
        f"sets of {n}": baselines.polychromic(group_size=config.group_size, set_size=n)
        for n in config.set_sizes
    }
    mean = dataclasses.replace(
        baselines.polychromic(group_size=config.group_size),
        advantage=baselines.normalized(
            center=advantages.centered, scale=advantages.by_centered_batch_std
        ),
    )
    with_bonus = {
        f"mean, entropy bonus {c:g}": dataclasses.replace(
            mean, regularizers=(objectives.entropy_bonus(c),)
        )
        for c in config.bonuses
    }
    methods = {"mean": mean, **with_bonus, **in_sets}
    every = max(config.steps // 40, 1)
    curves = {
        name: tabular.learn(
            hidden_bandit(config.arms),
            objective,
            optax.sgd(config.learning_rate),
            init=lambda key: jnp.zeros(config.arms),
            measure=coverage,
            group_size=config.group_size,
            steps=config.steps,
            seeds=config.seeds,
            every=every,
        )
        for name, objective in reproduction.track(methods.items())
    }
    table = {
        name: {f"pass@{k}": x[f"final/pass@{k}"] for k in BUDGETS} for name, x in curves.items()
    }
    shown = ["mean", *in_sets, *list(with_bonus)[1:3]]
    steps = np.arange(0, config.steps, every)
    panels: dict[str, dict[str, Any]] = {
        f"pass@{k}": {name: reproduction.band(steps, curves[name][f"pass@{k}"]) for name in shown}
        for k in BUDGETS
    }
    return reproduction.Findings(
        title="Coverage of hidden configurations",
        table=table,
        claims=claims(table, list(with_bonus)),
        panels=panels,
    )


def claims(table: dict[str, dict[str, Any]], bonuses: list[str]) -> list[reproduction.Claim]:
    sets, mean = table["sets of 4"], table["mean"]
    gain = reproduction.above(
        "sets of 4 raise pass@16 over the mean baseline", sets["pass@16"] - mean["pass@16"], 0.2
    )
    # The frontier of the bonus, its mean over seeds interpolated between neighbouring strengths.
    points = [mean, *(table[name] for name in bonuses)]
    wide = np.array([np.mean(p["pass@16"]) for p in points])
    single = np.array([np.mean(p["pass@1"]) for p in points])
    order = np.argsort(wide)
    reached = float(np.mean(sets["pass@16"]))
    inside = wide.min() <= reached <= wide.max()
    frontier = float(np.interp(reached, wide[order], single[order]))
    mine = sets["pass@1"]
    error = reproduction.standard_error(mine)
    return [
        gain,
        reproduction.Claim(
            "their pass@1 is above that of an entropy bonus with the same pass@16",
            bool(inside and mine.mean() - 2 * error > frontier),
            f"{mine.mean():.3f} ± {error:.3f} against {frontier:.3f} at pass@16 {reached:.3f}",
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main("poly_coverage", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
