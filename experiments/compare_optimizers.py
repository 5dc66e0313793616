"""Four optimizer stacks inside GRPO, from the same warm-up, for the same number of tokens.

AdamW on everything; Muon in Moonshot's scaling and PolarGrad on matrices, each with AdamW on the
rest; and the symmetry-compatible stack. A stack has as many pairs of learning rates to choose from
as every other: for matrices, and for what is left to AdamW (AdamW alone has as many single rates).
They are chosen on a seed of its own that enters no score. Scores and intervals are those of
experiments.compare_objectives. What is finished is not run again: the same command goes on where it
was stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from typing import Literal

from experiments.random_calculation import comparison
from experiments.random_calculation import config as main_job
from experiments.shared.objectives import ObjectiveName

Rates = tuple[float, ...]
BASELINE = "adamw"
# The command line's names of optimizers, each with the field of its rates.
STACKS = {
    "adamw": "adamw",
    "moonshot_muon": "muon",
    "polar_grad": "polar_grad",
    "symmetry": "symmetry",
}


@dataclasses.dataclass(frozen=True)
class Config(comparison.Common):
    """Stacks from the same warmed-up models."""

    objective: ObjectiveName = "grpo"
    """The recipe that all train by."""
    adamw: Rates = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
    """Rates of AdamW."""
    muon: Rates = (2.5e-5, 1e-4, 4e-4)
    """Of matrices."""
    polar_grad: Rates = (1e-4, 1e-3, 1e-2)
    """Of matrices."""
    symmetry: Rates = (4e-6, 2e-5, 1e-4)
    """Of matrices; embedding and head stand to it as published."""
    others: Rates = (5e-5, 2e-4)
    """Of AdamW beside matrix optimizers."""
    tasks: tuple[Literal["micro9", "micro19", "mini99"], ...] = ("micro19",)
    """Data presets; each is a stratum of the bootstrap."""
    seeds: int = 5
    """Seeds 0, 1, ... of every task: initialisation, warm-up and reinforcement."""
    out: pathlib.Path = pathlib.Path("runs/compare_optimizers")
    """Directory; what is finished there is not run again."""


PRESETS = {
    "quick": Config(
        **comparison.QUICK,
        adamw=(1e-4,),
        muon=(1e-3,),
        polar_grad=(1e-2,),
        symmetry=(1e-3,),
        others=(1e-4,),
    ),
    "cpu": Config(),
    "gpu": Config(**comparison.GPU),
}


def run_config(config: Config, task: str, seed: int, stack: str, rates: Rates) -> main_job.Config:
    """The main job's settings for one run."""
    return comparison.run_config(
        config,
        task,
        seed,
        "_".join([stack, *(f"{rate:g}" for rate in rates)]),
        {
            "learning_rate": rates[0],
            "adam_learning_rate": rates[1] if len(rates) > 1 else None,
        },
        objective=config.objective,
        optimizer=stack,
    )


def contest(config: Config) -> comparison.Contest:
    candidates: dict[str, list[Rates]] = {}
    for stack, field in STACKS.items():
        own = getattr(config, field)
        axes = (own,) if stack == BASELINE else (own, config.others)
        candidates[stack] = list(itertools.product(*axes))
    sizes = {stack: len(rates) for stack, rates in candidates.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"rates: expected as many to choose from for each stack, got {sizes}")
    return comparison.Contest(
        baseline=BASELINE,
        candidates=candidates,
        tasks=config.tasks,
        seeds=config.seeds,
        settings=lambda *which: run_config(config, *which),
        out=config.out,
    )


def main(arguments: list[str] | None = None) -> int:
    return comparison.main(PRESETS, contest, "compare_optimizers", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
