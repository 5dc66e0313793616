"""What a run reports: JSON lines, TensorBoard, a progress bar, a table, learning curves."""

from __future__ import annotations

from pgjax.train.metrics.plots import Curve, curves, plot_curves
from pgjax.train.metrics.records import FILE_NAME, MetricsWriter, read_metrics, repeats
from pgjax.train.metrics.terminal import Progress, progress, summary_table

__all__ = [
    "FILE_NAME",
    "Curve",
    "MetricsWriter",
    "Progress",
    "curves",
    "plot_curves",
    "progress",
    "read_metrics",
    "repeats",
    "summary_table",
]
