"""What a run leaves behind: table, picture, numbers."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax

import pgjax as pg
from experiments.random_calculation.config import Config
from experiments.shared import runs
from pgjax.train import evaluation


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to: test accuracy by level before and after the reinforcement."""

    directory: pathlib.Path
    before: dict[int, evaluation.Accuracy]
    after: dict[int, evaluation.Accuracy]
    seconds: dict[str, float]
    tokens_per_second: float
    time_shares: dict[str, float]


def write_report(config: Config, result: Result) -> None:
    """results.json and curves.png in the run's directory."""
    content = {
        "before": {n: a._asdict() for n, a in result.before.items()},
        "after": {n: a._asdict() for n, a in result.after.items()},
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "time_shares": result.time_shares,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    runs.write_json(result.directory / "results.json", content)
    records = pg.train.metrics.read_metrics(result.directory)

    curve = functools.partial(runs.curve, records)

    levels = config.evaluation.levels
    panels: dict[str, dict[str, tuple[Any, Any]]] = {
        "warm-up loss (nats per token)": {"loss": curve("warmup", "loss")},
        "reward (training prompts)": {config.reward: curve("rl", "reward")},
        "validation accuracy": {
            f"level {n}": curve("rl_evaluation", f"accuracy/level {n}") for n in levels
        },
        "completion length (tokens)": {"training": curve("rl", "completion_length")},
        "entropy (nats per token)": {"policy": curve("rl", "entropy")},
        "groups without signal": {"share": curve("rl", "groups_without_signal")},
    }
    pg.train.metrics.plot_curves(
        {title: lines for title, lines in panels.items() if all(len(x) for x, _ in lines.values())},
        result.directory / "curves.png",
        title=f"{config.objective} on RandomCalculation, {config.data_preset}, seed {config.seed}",
        smooth=10,
    )


def print_report(config: Config, result: Result) -> None:
    """The table a person reads at the end, and where everything lies."""
    import rich

    def with_interval(a: evaluation.Accuracy) -> str:
        return f"{100 * a.average:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]"

    def change(before: float, after: float) -> str:
        return f"{before:.0f} → {after:.0f}"

    k = config.evaluation.samples
    rows = [
        {
            "level": level,
            f"avg@{k} before": with_interval(before),
            f"avg@{k} after": with_interval(after),
            "gain": f"{100 * (after.average - before.average):+.1f}",
            f"pass@{k}": change(100 * before.pass_at_k, 100 * after.pass_at_k),
            f"maj@{k}": change(100 * before.majority_at_k, 100 * after.majority_at_k),
            "tokens": change(before.length, after.length),
        }
        for level, before in result.before.items()
        for after in [result.after[level]]
    ]
    title = "Accuracy on held-out (test) problems in % [95% interval], by number of operators"
    rich.print(pg.train.metrics.summary_table(rows, title=title))
    seconds = result.seconds
    rich.print(
        f"{result.tokens_per_second:,.0f} sampled tokens/s in the reinforcement; "
        f"warm-up {seconds['warmup']:.0f} s, reinforcement {seconds['rl']:.0f} s, "
        f"this sitting {seconds['total']:.0f} s in all"
    )
    rich.print(runs.shares_line(result.time_shares))
    for path in sorted(result.directory.iterdir()):
        print(f"  {path}{'/' if path.is_dir() else ''}")
