"""GTPO: learning right answers without losing the format they have to come in.

A tiny transformer (`experiments.shared.digits`) has read demonstrations of a format, an opening
token, two of four digits and a closing token, most of them with random digits. The reward is 2 for
a well-formed answer and 10 more for one with the right digits. Its entropy starts at .68 nats a
token, below the ln 2 from which on GTPO's filter never acts (with six digits, and one demonstration
in ten right, it starts at .91); GRPO alone was looked at in choosing this, on the seeds that tune.

Compared over a long run, with the published clip of gradients and fall of the learning rate: GRPO
and GTPO at every rate of Adam, of a list, at which GRPO without KL loses a tenth of its formats,
judged on seeds of its own; and, at the lowest of these, GRPO with a KL penalty and GTPO without its
conflict weights, its entropy gate, its entropy term.
Exits 1 if there is no such rate, if GTPO's lowest format rate after warm-up lies below GRPO's on
average over rates and seeds, or if its entropy starts or rises above the filter's ln 2.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import digits, reproduction
from pgjax import objectives
from pgjax.objectives import token_selection

COMPARED = ("GRPO", "GTPO")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    out: pathlib.Path = pathlib.Path("runs/gtpo_format")
    """Where results go."""
    seeds: int = 24
    """Independent runs of every method."""
    first_seed: int = 200
    """The others follow it."""
    tuning_seeds: int = 4
    """Others, by which the learning rate is chosen."""
    steps: int = 200
    """Batches."""
    warm_up: int = 20
    """Batches before format rates and entropies count."""
    pretraining: int = 300
    """Updates on demonstrations."""
    choices: int = 4
    """Different digits."""
    demonstrated: float = 0.3
    """Share of demonstrations with the right digits."""
    learning_rates: tuple[float, ...] = (0.002, 0.003, 0.005, 0.008, 0.012, 0.02)
    """Of Adam, at the height of its schedule; those at which GRPO degrades are used."""
    clip_norm: float = 0.1
    """Largest norm of a gradient, as published."""
    growth: int = 10
    """Steps for which the learning rate grows, before it falls to 0 along a cosine."""
    kl_coefficient: float = 0.04
    """Of the penalised GRPO."""
    width: int = 32
    """Of the transformer."""
    quick: bool = False
    """A tiny version, for tests."""


def reward(formed: Array, right: Array) -> Array:
    return 2.0 * formed + 10.0 * (formed & (right == 1))


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


def lost(formed: Float[np.ndarray, "S K"], warm_up: int) -> Float[np.ndarray, " S"]:
    """By how much each run's format rate falls below its best so far, at most."""
    formed = reproduction.smooth(formed[:, warm_up:])
    return np.max(np.maximum.accumulate(formed, axis=1) - formed, axis=1)


def run(config: Config) -> reproduction.Findings:
    task = digits.Digits(choices=config.choices, demonstrated=config.demonstrated)
    if config.quick:
        task = dataclasses.replace(task, prompts=2, group_size=4)
        config = dataclasses.replace(
            config,
            seeds=2,
            tuning_seeds=1,
            steps=6,
            warm_up=2,
            growth=2,
            pretraining=0,
            learning_rates=(0.001,),
            width=16,
        )
    decoder = digits.make_decoder(task, width=config.width)

    def optimizer(rate: Array) -> optax.GradientTransformation:
        falling = optax.cosine_decay_schedule(rate, config.steps - config.growth)
        growing = digits.increasing(config.growth, rate)
        schedule = optax.join_schedules([growing, falling], [config.growth])
        clipped = optax.clip_by_global_norm(config.clip_norm)
        return optax.chain(clipped, optax.adam(schedule))

    def learner(objective: pg.Objective) -> digits.Curves:
        return digits.learner(
            task,
            decoder,
            objective,
            optimizer,
            steps=config.steps,
            pretraining=config.pretraining,
            reward=reward,
        )

    grpo_curves = learner(objectives.grpo())
    tuning = grpo_curves(
        rates=config.learning_rates,
        seeds=config.tuning_seeds,
        first_seed=1000,
        label="learning rates",
    )
    falls = {
        rate: float(lost(formed, config.warm_up).mean())
        for rate, formed in zip(config.learning_rates, tuning["formed"], strict=True)
    }
    rates = [r for r, fall in falls.items() if fall >= 0.1] or [max(falls)]
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, objective in methods(config).items():
        at = rates if name in COMPARED else rates[:1]
        curves = learner(objective)(
            rates=at, seeds=config.seeds, first_seed=config.first_seed, label=name
        )
        for index, rate in enumerate(at):
            found[f"{name}, {rate:g}"] = {column: x[index] for column, x in curves.items()}
    after = {
        name: {column: reproduction.smooth(x[column][:, config.warm_up :]) for column in x}
        for name, x in found.items()
    }
    table = {
        name: {
            "lowest format rate": x["formed"].min(1),
            "final format rate": x["formed"][:, -1],
            "final reward": x["reward"][:, -1],
            "final digits right": x["right"][:, -1],
            "highest entropy": x["entropy"].max(1),
        }
        for name, x in after.items()
    }
    grpo, gtpo = ([f"{name}, {rate:g}" for rate in rates] for name in COMPARED)
    grpo_lost = [lost(found[name]["formed"], config.warm_up).mean() for name in grpo]
    lowest, other = (
        np.stack([table[name]["lowest format rate"] for name in names]) for names in (gtpo, grpo)
    )
    start = float(np.mean([found[name]["entropy"][:, 0] for name in gtpo]))
    highest = np.stack([table[name]["highest entropy"] for name in gtpo])
    lead = (lowest - other).mean(0)
    error = reproduction.standard_error(lead)
    seen = "; ".join(
        f"{x.mean():.3f} against {y.mean():.3f} at {rate:g}"
        for rate, x, y in zip(rates, lowest, other, strict=True)
    )
    claims = [
        reproduction.Claim(
            "there are learning rates at which GRPO without KL loses a tenth of its formats",
            bool(np.mean(grpo_lost) >= 0.1),
            ", ".join(f"{x:.3f} at {r:g}" for x, r in zip(grpo_lost, rates, strict=True))
            + "; on the other seeds "
            + ", ".join(f"{fall:.3f} at {r:g}" for r, fall in falls.items()),
        ),
        reproduction.Claim(
            "GTPO's lowest format rate is not below GRPO's",
            bool(lead.mean() >= 0),
            f"{lowest.mean():.3f} against {other.mean():.3f}, {lead.mean():+.3f} ± {error:.3f} "
            f"paired ({seen}); "
            f"not below in {np.sum(lowest >= other)} of {lowest.size} runs",
        ),
        reproduction.Claim(
            "GTPO's mean entropy starts, and stays, below ln 2",
            bool(start <= np.log(2) and np.all(highest.mean(1) <= np.log(2))),
            ", ".join(f"{x.mean():.3f} at {r:g}" for x, r in zip(highest, rates, strict=True))
            + f" at most, {start:.3f} in the beginning, ln 2 is {np.log(2):.3f}",
        ),
    ]
    steps = np.arange(config.steps)
    return reproduction.Findings(
        title="Answers in a fixed format",
        table=table,
        claims=claims,
        panels={
            f"{title}, lr {rate:g}": {
                name: reproduction.band(steps, x[column])
                for name, x in found.items()
                if name.endswith(f", {rate:g}")
            }
            for rate in rates
            for title, column in (("format rate", "formed"), ("reward", "reward"))
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main("gtpo_format", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
