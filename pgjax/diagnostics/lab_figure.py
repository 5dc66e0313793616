"""Reports of many estimators on many problems as one picture."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pgjax.diagnostics.laboratory import EstimatorReport

EXACT = 1e-9  # a residual below this is rounding
_INK, _QUIET, _EXACT_COLOR = "#22303c", "#6b7885", "#1f8a70"
_RESIDUAL = ("#fdf3e1", "#f6c77f", "#e2725b", "#9c2f5d", "#3d1a4f")
_COSINE = ("#7b1e4b", "#d98a9f", "#f4f1ec", "#7fc0b4", "#12665c")
_SIGNAL = ("#f3f1f7", "#b9c6e4", "#6f95cf", "#2f5fa8", "#122b5c")


class _Panel(NamedTuple):
    """One of the tables: what its cells say and look like."""

    heading: str
    unit: str
    values: Float[np.ndarray, "R C"]
    palette: Any
    norm: Any
    text: Callable[[float], str]
    width: float  # of a column, in inches


def draw_atlas(
    reports: Mapping[str, Mapping[str, EstimatorReport]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    note: str | None = None,
    marks: Mapping[str, str] | None = None,
) -> None:
    """Three tables of coloured cells, a row an estimator and a column a problem.

    Residual off the best multiple of the true gradient, in percent; cosine to it, with a number
    where it is negative; and signal-to-noise ratio. Residuals that are 0 up to rounding stand out
    in green; a dash is an expected gradient that is 0 or not a number.

    Args:
      reports: estimator -> problem -> report; the same problems for all, drawn in that order.
      path: where the image goes; the ending chooses the format (`.png`, `.pdf`, `.svg`).
      title: above all.
      note: a line below the title.
      marks: a sign or word behind some estimators' names, which are then green.

    Raises:
      ImportError: without the matplotlib package.
      ValueError: no report, or estimators on different problems.
    """
    rows = list(reports)
    columns = list(next(iter(reports.values()), {}))
    if not columns:
        raise ValueError("reports: expected at least one estimator on one problem, got none")
    for name, found in reports.items():
        if list(found) != columns:
            raise ValueError(f"reports[{name!r}]: expected {columns}, got {list(found)}")

    import matplotlib
    from matplotlib.figure import Figure

    marks = marks or {}
    panels = _panels(reports, columns)
    # In inches, from the upper left corner.
    left, gap, top, row_height = 1.62, 0.3, 1.78, 0.25
    height = row_height * len(rows)
    across = sum(panel.width * len(columns) + gap for panel in panels)
    size = (left + across + 0.15, top + height + 0.12)
    settings: Any = {"font.size": 9, "text.color": _INK, "svg.hashsalt": "pgjax"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, facecolor="white")

        def write(x: float, y: float, text: str, **style: Any) -> None:
            figure.text(x / size[0], 1 - y / size[1], text, **style)

        x = left
        for panel in panels:
            width = panel.width * len(columns)
            axis = figure.add_axes((x / size[0], 0.12 / size[1], width / size[0], height / size[1]))
            _cells(axis, panel)
            _labels(axis, columns, rows if x == left else [], marks)
            write(x, 0.76, panel.heading, fontsize=10.5, fontweight="bold")
            write(x, 0.95, panel.unit, fontsize=8, color=_QUIET)
            x += width + gap
        write(0.14, 0.3, title or "", fontsize=14, fontweight="bold")
        write(0.14, 0.51, note or "", fontsize=8.5, color=_QUIET)
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=170, metadata=metadata)


def _panels(
    reports: Mapping[str, Mapping[str, EstimatorReport]], columns: list[str]
) -> list[_Panel]:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    def numbers(quantity: Callable[[EstimatorReport], Any]) -> Float[np.ndarray, "R C"]:
        return np.array(
            [[float(quantity(row[c]).value) for c in columns] for row in reports.values()]
        )

    def colors(name: str, stops: tuple[str, ...]) -> Any:
        return LinearSegmentedColormap.from_list(name, stops)

    # Nothing is known of the direction of a gradient that is 0 (or NaN).
    nowhere = ~(numbers(lambda report: report.expected.norm_ratio) > 0)

    def directed(values: Float[np.ndarray, "R C"]) -> Float[np.ndarray, "R C"]:
        return np.where(nowhere, np.nan, values)

    signal = directed(numbers(lambda report: report.signal_to_noise))
    shown = signal[np.isfinite(signal) & (signal > 0)]
    low, high = (shown.min(), shown.max()) if shown.size else (0.1, 1.0)
    return [
        _Panel(
            "Bias that no step size mends",
            "part of E[gradient] off the policy gradient, %",
            directed(numbers(lambda report: report.expected.residual)),
            colors("residual", _RESIDUAL),
            Normalize(0, 1),
            _percent,
            0.45,
        ),
        _Panel(
            "Direction",
            "cosine: green 1, white 0, red −1",
            directed(numbers(lambda report: report.expected.cosine)),
            colors("cosine", _COSINE),
            Normalize(-1, 1),
            lambda cosine: f"−{-cosine:.1f}" if cosine <= -0.05 else "",
            0.27,
        ),
        _Panel(
            "Signal against noise",
            "‖E[gradient]‖² / variance of one batch's gradient",
            signal,
            colors("signal", _SIGNAL),
            LogNorm(max(min(low, high / 10), high / 1000), high, clip=True),
            _short,
            0.45,
        ),
    ]


def _labels(axis: Any, columns: list[str], rows: list[str], marks: Mapping[str, str]) -> None:
    axis.xaxis.tick_top()
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns)
    names = [f"{name} {marks.get(name, '')}".strip() for name in rows]
    axis.set_yticks(np.arange(len(rows)) + 0.5, names)
    axis.tick_params(length=0, pad=3, colors=_INK)
    axis.spines[:].set_visible(False)
    for label in axis.get_xticklabels():
        label.set(fontsize=8.5, rotation=42, ha="left", va="bottom", rotation_mode="anchor")
    for label, name in zip(axis.get_yticklabels(), rows, strict=True):
        if marks.get(name):
            label.set(color=_EXACT_COLOR, fontweight="bold")


def _cells(axis: Any, panel: _Panel) -> None:
    """Rounded-off numbers on coloured tiles."""
    from matplotlib.patches import FancyBboxPatch

    rows, columns = panel.values.shape
    axis.set_xlim(0, columns)
    axis.set_ylim(rows, 0)
    for (row, column), value in np.ndenumerate(panel.values):
        exact = panel.text is _percent and value < EXACT
        color = panel.palette(panel.norm(value)) if np.isfinite(value) else panel.palette(1.0)
        if exact:
            color = _rgb(_EXACT_COLOR)
        elif np.isnan(value):
            color = _rgb("#eeeeee")
        tile = FancyBboxPatch(
            (column + 0.05, row + 0.06),
            0.90,
            0.88,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=color,
            edgecolor="none",
        )
        axis.add_patch(tile)
        axis.text(
            column + 0.5,
            row + 0.53,
            "0" if exact else panel.text(value),
            ha="center",
            va="center",
            fontsize=7.5 if panel.width > 0.4 else 6,
            fontweight="bold" if exact else "normal",
            color="white" if np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.56 else _INK,
        )


def _rgb(name: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgba

    return to_rgba(name)


def _percent(share: float) -> str:
    if np.isnan(share):
        return "–"
    return f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"


def _short(value: float) -> str:
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "∞"
    if 0 < value < 0.00095:
        return "<.001"
    digits = 3 if abs(value) < 0.0995 else 2 if abs(value) < 9.995 else 0
    return f"{value:.{digits}f}".replace("-", "−")
