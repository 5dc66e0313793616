"""Tables and figures of a comparison: scores at equal tokens, with intervals."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import pgjax as pg
from experiments.shared import runs
from pgjax.diagnostics import intervals

Interval = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracy on held-out problems, mean over levels, by sampled tokens; and on the test's."""

    tokens: Float[np.ndarray, " N"]
    accuracy: Float[np.ndarray, " N"]
    test_before: float
    test_after: float

    def at(self, tokens: float) -> float:
        return float(np.interp(tokens, self.tokens, self.accuracy))


Curves = Mapping[str, Sequence[Sequence[Curve]]]


def scores_at_equal_tokens(
    curves: Curves,
) -> tuple[dict[str, Float[np.ndarray, "R K"]], Float[np.ndarray, "R K"]]:
    """Accuracy of each method at the tokens all of them have used; and those tokens."""
    budget = np.array([[[c.tokens[-1] for c in row] for row in rows] for rows in curves.values()])
    budget = budget.min(0)
    scores = {
        name: np.array(
            [[curve.at(budget[i, k]) for k, curve in enumerate(row)] for i, row in enumerate(rows)]
        )
        for name, rows in curves.items()
    }
    return scores, budget


def with_interval(values: Float[np.ndarray, "R K"]) -> Interval:
    """Interquartile mean and its stratified bootstrap interval."""
    scores = jnp.asarray(values)
    middle = float(intervals.interquartile_mean(scores))
    low, high = intervals.stratified_bootstrap(
        scores, intervals.interquartile_mean, jax.random.key(0)
    )
    return middle, float(low), float(high)


def report(
    curves: Curves,
    *,
    baseline: str,
    chosen: Mapping[str, Any],
    searched: bool,
    tasks: Sequence[str],
    config: Any,
    out: pathlib.Path,
) -> None:
    """Prints the table, best first; writes `results.json` and `comparison.png` to `out`.

    Args:
      curves: of each method `[seed][task]`.
      chosen: of each method its setting, which the table shows if it was `searched`.
      config: a dataclass, kept beside the results.
    """
    import rich

    scores, budget = scores_at_equal_tokens(curves)
    summary = {name: with_interval(values) for name, values in scores.items()}
    gains = {name: with_interval(values - scores[baseline]) for name, values in scores.items()}
    order = sorted(summary, key=lambda name: -summary[name][0])
    rows = [
        {
            "method": name,
            "IQM % [95%]": _percent(summary[name]),
            f"minus {baseline}": "" if name == baseline else _percent(gains[name], sign=True),
            "test % before": f"{100 * _mean(curves[name], 'test_before'):.1f}",
            "test % after": f"{100 * _mean(curves[name], 'test_after'):.1f}",
            "tokens": int(np.mean([[c.tokens[-1] for c in row] for row in curves[name]])),
        }
        | ({"setting": str(chosen[name])} if searched else {})
        for name in order
    ]
    title = (
        f"Held-out accuracy after {int(budget.mean()):,} sampled tokens, "
        f"{len(curves[baseline])} seeds on {', '.join(tasks)}"
    )
    rich.print(pg.train.metrics.summary_table(rows, title=title))
    runs.write_json(
        out / "results.json",
        {
            "config": dataclasses.asdict(config),
            "tokens": budget.tolist(),
            "scores": {name: scores[name].tolist() for name in order},
            "interquartile_mean": {name: summary[name] for name in order},
            f"minus_{baseline}": {name: gains[name] for name in order},
            "settings": dict(chosen),
        },
    )
    _plot(out / "comparison.png", order, summary, gains, baseline, title)
    rich.print(f"  {out / 'results.json'}\n  {out / 'comparison.png'}")


def _percent(numbers: Interval, *, sign: bool = False) -> str:
    middle, low, high = (100 * x for x in numbers)
    return (
        f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
        if sign
        else f"{middle:.1f} [{low:.1f}, {high:.1f}]"
    )


def _mean(rows: Sequence[Sequence[Curve]], name: str) -> float:
    return float(np.mean([[getattr(curve, name) for curve in row] for row in rows]))


def _plot(
    path: pathlib.Path,
    order: Sequence[str],
    summary: Mapping[str, Interval],
    gains: Mapping[str, Interval],
    baseline: str,
    title: str,
) -> None:
    """Scores and differences with their intervals, best first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 0.26 * len(order) + 1.5))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    panels: list[tuple[Any, str]] = [
        (summary, "interquartile mean accuracy, %"),
        (gains, f"difference to {baseline}, points"),
    ]
    rows = np.arange(len(order))
    for axis, (numbers, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        middle, low, high = 100 * np.array([numbers[name] for name in order]).T
        axis.hlines(rows, low, high, color="#8fb3d9", linewidth=5, capstyle="round")
        axis.plot(middle, rows, "o", color="#1f4e79", markersize=5)
        axis.set_xlabel(label, fontsize=9)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8.5, length=0)
        if numbers is gains:
            axis.axvline(0, color="#555555", linewidth=0.8)
    axis.set_yticks(rows, order)
    axis.set_ylim(len(order) - 0.4, -0.6)
    figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=160)
