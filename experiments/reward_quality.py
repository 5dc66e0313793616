"""Only rewards that say the truth teach: the claim of "Reasoning or Memorization?".

For each seed one warm-up, and from it one reinforcement run per reward: exact, continuous, random,
inverted, and the model's own most frequent wrong answer. On problems that no one has seen, accurate
rewards must improve held-out accuracy, the others must harm it, and the inverted one most (arXiv
2507.10532). Exits with 1 if that does not show.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

import pgjax as pg
from experiments.random_calculation import config as main_job
from experiments.random_calculation.run import run
from experiments.shared import command_line

ACCURATE: tuple[main_job.RewardName, ...] = ("exact", "continuous")
SPURIOUS: tuple[main_job.RewardName, ...] = ("random", "inverted", "majority_incorrect")
LEVEL = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """Accurate against spurious rewards, from the same warmed-up models."""

    seeds: int = 3
    """Seeds 0, 1, ...: initialisation, warm-up and reinforcement."""
    steps: int = 150
    """Reinforcement steps of every run."""
    warmup_steps: int = 600
    """Supervised steps before."""
    test_prompts: int = 256
    """Test prompts per level."""
    out: pathlib.Path = pathlib.Path("runs/reward_quality")
    """Directory; what is finished there is not run again."""
    data_dir: pathlib.Path | None = None
    """Where data sets live; default: TFDS_DATA_DIR or ~/tensorflow_datasets."""


def run_config(config: Config, seed: int, reward: main_job.RewardName) -> main_job.Config:
    """The main job with another reward, on the levels of the paper's demonstration."""
    levels = (1, 2, 3)
    first = config.out / f"seed{seed}" / ACCURATE[0]
    out = config.out / f"seed{seed}" / reward
    return main_job.Config(
        reward=reward,
        seed=seed,
        out=out,
        resume=(out / "config.json").exists(),
        data_dir=config.data_dir,
        warmup_from=None if reward == ACCURATE[0] else first,
        show_every=0,
        warmup=main_job.Warmup(steps=config.warmup_steps, levels=levels),
        rl=main_job.RL(steps=config.steps, levels=(2, 3)),
        evaluation=main_job.Evaluation(
            levels=levels, test_prompts=config.test_prompts, every=min(50, config.steps)
        ),
    )


def verdict(before: np.ndarray, after: dict[str, np.ndarray]) -> dict[str, bool]:
    """The claim, part by part: accuracies per seed before, and after each reward."""
    others = [name for name in SPURIOUS if name != "inverted"]
    return {
        "accurate rewards improve every seed": all(
            np.all(after[name] > before) for name in ACCURATE
        ),
        "spurious rewards leave every seed 10 points or more below its start": all(
            np.all(after[name] <= before - 0.10) for name in SPURIOUS
        ),
        "the inverted reward ends lowest": all(
            np.all(after["inverted"] <= after[name]) for name in others
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    import rich

    config = command_line.parse(Config, "reward_quality", description=__doc__, arguments=arguments)
    rewards = ACCURATE + SPURIOUS
    before = np.zeros(config.seeds)
    after: dict[str, np.ndarray] = {name: np.zeros(config.seeds) for name in rewards}
    try:
        for seed in range(config.seeds):
            for reward in rewards:
                rich.print(f"[bold]seed {seed}, reward {reward}")
                result = run(run_config(config, seed, reward))
                assert result is not None  # this process is alone
                after[reward][seed] = result.after[LEVEL].average
                before[seed] = result.before[LEVEL].average
    except pg.train.Interrupted as stop:
        print(f"\n{stop}. The same command goes on from there.")
        return 128 + stop.signal_number
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    rows = [
        {
            "reward": name,
            "mean %": 100 * values.mean(),
            "std %": 100 * values.std(ddof=1) if config.seeds > 1 else None,
            "gain": None if name == "none (warm-up)" else 100 * (values - before).mean(),
            "seeds %": "  ".join(f"{100 * v:.1f}" for v in values),
        }
        for name, values in {"none (warm-up)": before, **after}.items()
    ]
    title = f"Held-out accuracy at level {LEVEL} (avg@8), {config.seeds} seeds"
    rich.print(pg.train.metrics.summary_table(rows, title=title))
    checks = verdict(before, after)
    for claim, holds in checks.items():
        rich.print(f"{'[green]yes' if holds else '[red]no '}[/] {claim}")

    numbers = {name: values.tolist() for name, values in {"before": before, **after}.items()}
    path = config.out / "results.json"
    path.write_text(json.dumps({"level": LEVEL, "accuracy": numbers, "claims": checks}, indent=2))
    _plot(config, rewards)
    rich.print(f"  {path}\n  {config.out / 'curves.png'}")
    return 0 if all(checks.values()) else 1


def _plot(config: Config, rewards: tuple[str, ...]) -> None:
    """Validation accuracy over training, mean over seeds with the range between them."""
    panels: dict[str, dict[str, tuple[Any, Any, Any, Any]]] = {}
    for level in (2, LEVEL):
        panel = panels.setdefault(f"accuracy at level {level} (validation)", {})
        for reward in rewards:
            curves = []
            for seed in range(config.seeds):
                path = config.out / f"seed{seed}" / reward / "metrics.jsonl"
                records = [
                    r for r in pg.train.metrics.read_metrics(path) if r["phase"] == "rl_evaluation"
                ]
                steps = np.array([r["step"] for r in records])
                curves.append([r[f"accuracy/level {level}"] for r in records])
            y = np.array(curves)
            panel[reward] = (steps, y.mean(0), y.min(0), y.max(0))
    pg.train.metrics.plot_curves(
        panels,
        config.out / "curves.png",
        x_label="step",
        title="Accurate and spurious rewards from the same warmed-up models",
        columns=2,
    )


if __name__ == "__main__":
    sys.exit(main())
