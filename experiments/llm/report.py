"""What a run leaves behind: table, picture, numbers."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax

import pgjax as pg
from experiments.llm.config import Common
from experiments.shared import runs
from pgjax.train import evaluation


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to: test accuracy before and after the training."""

    directory: pathlib.Path
    before: evaluation.Accuracy
    after: evaluation.Accuracy
    seconds: float
    tokens_per_second: float
    time_shares: dict[str, float]


def write_report(config: Common, result: Result, phase: str) -> None:
    """results.json and curves.png in the run's directory."""
    content = {
        "before": result.before._asdict(),
        "after": result.after._asdict(),
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "time_shares": result.time_shares,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    runs.write_json(result.directory / "results.json", content)
    records = pg.train.metrics.read_metrics(result.directory)

    curve = functools.partial(runs.curve, records)

    evaluated = f"{phase}_evaluation"
    panels: dict[str, dict[str, tuple[Any, Any]]] = {
        "loss": {"training": curve(phase, "loss")},
        "reward": {"training": curve(phase, "reward")},
        "validation": {
            name: curve(evaluated, name) for name in ("accuracy", "pass_at_k", "majority_at_k")
        },
        "completion length (tokens)": {
            "training": curve(phase, "completion_length"),
            "validation": curve(evaluated, "length"),
        },
        "entropy (nats per token)": {"policy": curve(phase, "entropy")},
    }
    kept = {
        title: {name: line for name, line in lines.items() if len(line[0])}
        for title, lines in panels.items()
    }
    pg.train.metrics.plot_curves(
        {title: lines for title, lines in kept.items() if lines},
        result.directory / "curves.png",
        title=f"{config.model.name}, seed {config.seed}",
        smooth=10,
    )


def print_report(config: Any, result: Result) -> None:
    """The table a person reads at the end, and where everything lies."""
    import rich

    k = 1 if config.evaluation.temperature == 0 else config.evaluation.samples
    rows = [
        {
            "model": name,
            f"avg@{k} %": f"{100 * a.average:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]",
            f"pass@{k} %": f"{100 * a.pass_at_k:.1f}",
            f"maj@{k} %": f"{100 * a.majority_at_k:.1f}",
            "tokens": f"{a.length:.0f}",
        }
        for name, a in (("before", result.before), ("after", result.after))
    ]
    title = f"{result.after.num_prompts} test problems [95% interval]"
    rich.print(pg.train.metrics.summary_table(rows, title=title))
    rich.print(
        f"{result.tokens_per_second:,.0f} tokens/s (median over steps), "
        f"this sitting {result.seconds:.0f} s in all"
    )
    rich.print(runs.shares_line(result.time_shares))
    for path in sorted(result.directory.iterdir()):
        print(f"  {path}{'/' if path.is_dir() else ''}")
