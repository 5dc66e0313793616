"""Every objective from the same warm-up, on the same data, for the same number of tokens.

For each task and seed one supervised warm-up on RandomCalculation; from it one reinforcement run
per recipe, with prompts in the same order and the same number of completions. Methods that write
longer completions use more tokens, so accuracies are compared at the tokens that all have used.
Scores are interquartile means over seeds and tasks, with stratified bootstrap intervals
(arXiv 2108.13264), and their difference to GRPO's from the same warm-ups.

Nothing is tuned for one method only: all have the same optimizer, and where several learning rates
are given, each recipe's is chosen from the same list, on a seed of its own that enters no score.
What is finished is not run again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import typing

from experiments.random_calculation import comparison
from experiments.random_calculation import config as main_job
from experiments.shared.objectives import ObjectiveName

RECIPES: tuple[str, ...] = typing.get_args(ObjectiveName)
BASELINE = "grpo"
# Options without which a recipe cannot be made; the defaults stand for everything else.
OPTIONS: dict[str, tuple[str, ...]] = {
    "capo": ("learning_rate=2e-4",),
    "gcpo": ("length_reference=64",),
    "stratified_grpo": ("alpha=0.5", "bucket_width=8"),
}


@dataclasses.dataclass(frozen=True)
class Config(comparison.Common):
    """Recipes from the same warmed-up models."""

    recipes: tuple[str, ...] = RECIPES
    """What is compared; GRPO always is."""
    learning_rates: tuple[float, ...] = (4e-4,)
    """The search space, the same for every recipe; one value: no search."""
    out: pathlib.Path = pathlib.Path("runs/compare_objectives")
    """Directory; what is finished there is not run again."""


PRESETS = {
    "quick": Config(**comparison.QUICK, recipes=("grpo", "rloo")),
    "cpu": Config(),
    "gpu": Config(**comparison.GPU, learning_rates=(1e-4, 2e-4, 4e-4)),
}


def run_config(
    config: Config, task: str, seed: int, recipe: str, learning_rate: float
) -> main_job.Config:
    """The main job's settings for one run."""
    return comparison.run_config(
        config,
        task,
        seed,
        recipe if len(config.learning_rates) == 1 else f"{recipe}_{learning_rate:g}",
        {"learning_rate": learning_rate},
        objective=recipe,
        objective_options=OPTIONS.get(recipe, ()),
    )


def contest(config: Config) -> comparison.Contest:
    recipes = tuple(dict.fromkeys((BASELINE, *config.recipes)))
    for name in recipes:
        if name not in RECIPES:
            raise ValueError(f"recipes: expected some of {', '.join(RECIPES)}, got {name!r}")
    if not config.learning_rates:
        raise ValueError("learning_rates: expected at least one")
    return comparison.Contest(
        baseline=BASELINE,
        candidates=dict.fromkeys(recipes, config.learning_rates),
        tasks=config.tasks,
        seeds=config.seeds,
        settings=lambda *which: run_config(config, *which),
        out=config.out,
    )


def main(arguments: list[str] | None = None) -> int:
    return comparison.main(PRESETS, contest, "compare_objectives", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
