"""Learning curves."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Curve = tuple[Any, Any] | tuple[Any, Any, Any, Any]


def curves(
    rows: Iterable[Mapping[str, Any]],
    panels: Mapping[str, str],
    *,
    label: str = "",
    phase: str | None = None,
) -> dict[str, dict[str, Curve]]:
    """Records as the series that `plot_curves` draws.

    Args:
      rows: from `read_metrics`.
      panels: title of the panel, with the unit, by name of the value, as in
        `{"kl": "KL to the reference [nats]"}`. Rows without the value are skipped.
      label: of the curve; curves of several runs are merged panel by panel.
      phase: only rows of this phase; default: all.
    """
    rows = [row for row in rows if phase is None or row.get("phase") == phase]
    result: dict[str, dict[str, Curve]] = {}
    for name, title in panels.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        x, y = np.array(points, float).reshape(-1, 2).T
        result[title] = {label: (x, y)}
    return result


def _smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """Trailing mean over up to `window` points, NaN left out; NaN where all are."""
    finite = np.isfinite(y)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, y, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    end = np.arange(1, len(y) + 1)
    start = np.maximum(end - window, 0)
    count = counts[end] - counts[start]
    return np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)


def _checked(
    series: Mapping[str, Mapping[str, Curve]],
) -> dict[str, dict[str, tuple[np.ndarray, ...]]]:
    """The curves as float arrays `[N]`; ValueError naming one that is not."""
    checked: dict[str, dict[str, tuple[np.ndarray, ...]]] = {}
    for panel, lines in series.items():
        checked[panel] = {}
        for label, curve in lines.items():
            arrays = tuple(np.asarray(part, float) for part in curve)
            if len(arrays) not in (2, 4) or any(a.shape != arrays[0].shape for a in arrays):
                raise ValueError(
                    f"series[{panel!r}][{label!r}]: expected (x, y) or (x, y, low, high) of one "
                    f"length, got shapes {[a.shape for a in arrays]}"
                )
            if arrays[0].ndim != 1:
                raise ValueError(
                    f"series[{panel!r}][{label!r}]: expected rank 1, got {arrays[0].shape}"
                )
            checked[panel][label] = arrays
    return checked


# Okabe and Ito's colours, told apart under the common forms of colour blindness; black is for text.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_INK, _FAINT = "#2b2b2b", "#d9d9d9"


def plot_curves(
    series: Mapping[str, Mapping[str, Curve]],
    path: str | os.PathLike[str],
    *,
    x_label: str = "step",
    title: str | None = None,
    smooth: int = 1,
    columns: int = 3,
) -> None:
    """Draws learning curves as small multiples with one legend.

    Args:
      series: for each panel's title (with its unit) the curves by label; a curve is `(x, y)` or
        `(x, y, low, high)`, each `[N]`, drawn with a band from low to high. One label has one
        colour in all panels. NaN leaves a gap.
      path: where the image goes; the ending chooses the format (`.png`, `.pdf`, `.svg`).
      x_label: of the horizontal axes, with its unit.
      title: above all panels.
      smooth: points of a trailing mean, at most a tenth of a curve's; above 1 the raw curve stays
        visible, faintly. Curves with a band are drawn as they are.
      columns: panels side by side, at most.

    Raises:
      ImportError: without the matplotlib package.
      ValueError: no panel, arrays of unequal length, or counts below 1.
    """
    if not series:
        raise ValueError("series: expected at least one panel, got none")
    if smooth < 1 or columns < 1:
        raise ValueError(f"smooth, columns: expected at least 1, got {smooth} and {columns}")
    checked = _checked(series)

    import matplotlib
    from matplotlib.figure import Figure  # draws off screen, whatever backend pyplot has
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(label for lines in checked.values() for label in lines))
    color = {label: _COLORS[i % len(_COLORS)] for i, label in enumerate(labels)}
    style = {label: "-" if i < len(_COLORS) else "--" for i, label in enumerate(labels)}
    across = min(columns, len(checked))
    down = -(-len(checked) // across)
    settings: Any = {
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": "#8a8a8a",
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.unicode_minus": True,
        "svg.hashsalt": "pgjax",  # the same curves give the same file
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(3.3 * across + 0.3, 2.5 * down + 0.55))
        figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.08)
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis, (panel, drawn) in zip(axes, checked.items(), strict=False):
            for label, (x, y, *band) in drawn.items():
                window = 1 if band else max(1, min(smooth, len(y) // 10))
                if window > 1:
                    axis.plot(x, y, color=color[label], alpha=0.25, linewidth=0.7)
                single = np.isfinite(y).sum() == 1
                axis.plot(
                    x,
                    _smoothed(y, window),
                    style[label],
                    color=color[label],
                    linewidth=1.5,
                    marker="o" if single else None,
                    markersize=4,
                    label=label,
                )
                if band:
                    axis.fill_between(x, *band, color=color[label], alpha=0.18, linewidth=0)
            axis.set_title(panel, fontsize=9.5, loc="left", pad=6)
            axis.set_xlabel(x_label)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color=_FAINT, linewidth=0.6)
            axis.set_axisbelow(True)
            axis.margins(x=0.02)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
            axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axis.tick_params(length=3, width=0.6)
            if not any(np.isfinite(y).any() for _, y, *_ in drawn.values()):
                axis.set(xticks=[], yticks=[])
                axis.text(
                    0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color="#8a8a8a"
                )
        for axis in axes[len(checked) :]:
            axis.set_visible(False)
        if any(labels):
            handles = {
                text: handle
                for axis in axes[: len(checked)]
                for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=min(len(handles), 2 * across),
                frameon=False,
            )
        if title:
            figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)
