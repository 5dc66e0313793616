"""What a run reports: JSON lines, TensorBoard, a progress bar, a table, learning curves."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
_RESERVED = ("step", "phase")


# --- records -------------------------------------------------------------------------------------


def _number(name: str, value: Any) -> float | int:
    """A Python number; ValueError for what is none."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, int | float):
        return value
    try:
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype.kind in "biu":
            return int(array)
        if array.ndim == 0:
            return float(array)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name}: expected a number, got {value!r}")


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Complete lines, and what follows the last newline."""
    *lines, tail = data.split(b"\n")
    return lines, tail


def _parse(lines: Sequence[bytes], path: Any) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
        rows.append(row)
    return rows


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, oldest first.

    Args:
      path: the file, or the directory a `MetricsWriter` wrote to.

    Returns:
      one dict per record: `step`, `phase` and numbers, NaN where a value was not finite. A last
      line that a dying process left incomplete is left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: any other line that is not a JSON object, naming the line.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    lines, tail = _split(path.read_bytes())
    with contextlib.suppress(ValueError):
        lines = [*lines, *([tail] if isinstance(json.loads(tail), dict) else [])]
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in _parse(lines, path)
    ]


def _belongs(phase: Any, phases: Sequence[str]) -> int | None:
    """The index of the phase that `phase` is, or is a part of, as `sft_evaluation` is of `sft`."""
    found = [
        i for i, name in enumerate(phases) if phase == name or str(phase).startswith(f"{name}_")
    ]
    return max(found, key=lambda i: len(phases[i]), default=None)


class MetricsWriter:
    """Appends records to `metrics.jsonl`, and to TensorBoard files under `tensorboard/<phase>`.

    A line is one write to a file opened for appending, so a process that dies leaves whole lines,
    and at worst a torn last one, which the next writer removes. TensorBoard's files follow within
    seconds; what they lack after a crash, `metrics.jsonl` has. In a job of several processes one
    of them writes.
    """

    def __init__(self, directory: str | os.PathLike[str], *, tensorboard: bool = True) -> None:
        """Opens a directory, which is made where it does not exist, and goes on after its records.

        Args:
          directory: where to write.
          tensorboard: whether to write TensorBoard files too. Without the tensorboardX package
            there are none, which is logged once.

        Raises:
          NotADirectoryError: the path, or a part of it, is a file.
          OSError: the directory cannot be made or written to.
        """
        self._directory = pathlib.Path(directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(
                f"directory: {self._directory} cannot hold metrics: "
                "it, or a part of its path, is a file"
            ) from error
        self.path = self._directory / FILE_NAME
        self._file: int | None = None
        self._open()
        self._not_finite: set[str] = set()
        self._tensorboard = tensorboard
        self._purge: dict[str, int] = {}
        self._event_writers: dict[str, Any] = {}

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        _, tail = _split(self.path.read_bytes())
        if not tail:
            return
        try:
            whole = isinstance(json.loads(tail), dict)
        except ValueError:
            whole = False
        if whole:
            os.write(self._file, b"\n")
        else:
            os.ftruncate(self._file, os.path.getsize(self.path) - len(tail))

    def write(self, step: int, values: Mapping[str, Any], *, phase: str = "train") -> None:
        """Appends one record.

        Args:
          step: of the phase, at least 0.
          values: numbers by name: Python, NumPy or JAX scalars. Values that are not finite are
            written as null (JSON has no NaN), and the first of each name is logged.
          phase: part of the run.

        Raises:
          ValueError: a value that is not a number, or named `step` or `phase`; a closed writer.
        """
        if self._file is None:
            raise ValueError(f"metrics in {self._directory} are closed")
        for name in _RESERVED:
            if name in values:
                raise ValueError(f"values: {name!r} is a field of every record, use another name")
        numbers = {name: _number(f"values[{name!r}]", value) for name, value in values.items()}
        row: dict[str, Any] = {"step": int(step), "phase": phase}
        for name, number in numbers.items():
            finite = math.isfinite(number)
            row[name] = number if finite else None
            if not finite and name not in self._not_finite:
                self._not_finite.add(name)
                logger.warning(
                    "%s is %s at step %d of %s; written as null, here and from now on",
                    name,
                    number,
                    step,
                    phase,
                )
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path}: a record was written in part; is the disk full?")
        writer = self._events(phase)
        if writer is not None:
            for name, number in numbers.items():
                if math.isfinite(number):
                    writer.add_scalar(name, number, step)

    def _events(self, phase: str) -> Any:
        if not self._tensorboard:
            return None
        if phase not in self._event_writers:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                self._tensorboard = False
                logger.warning(
                    "tensorboardX is not installed: metrics go to %s only "
                    "(pip install tensorboardX, or pgjax[experiments])",
                    self.path,
                )
                return None
            directory = self._directory / "tensorboard" / phase
            # Files are named by the second, read in order of name, and overwritten when equal.
            number = len(list(directory.glob("events.*"))) if directory.is_dir() else 0
            self._event_writers[phase] = SummaryWriter(
                str(directory),
                purge_step=self._purge.pop(phase, None),
                filename_suffix=f".{number:04d}",
                flush_secs=5,
            )
        return self._event_writers[phase]

    def truncate_after(
        self, step: int, *, phase: str = "train", phases: Sequence[str] | None = None
    ) -> int:
        """Drops what a run resumed at `step` of `phase` is about to record again.

        Kept are earlier phases, and of this phase the steps up to `step`. A phase whose name goes
        on after an underscore, as `sft_evaluation` does after `sft`, is a part of it. The file is
        replaced in one move; TensorBoard hides the points dropped.

        Args:
          step: of the checkpoint the run resumes from; records at `step` itself are kept.
          phase: the phase resumed.
          phases: all phases in order; default: in the order the file first mentions them.

        Returns:
          how many records were dropped.

        Raises:
          ValueError: `phase` is not among `phases`, or the file has one that is not.
        """
        if self._file is None:
            raise ValueError(f"metrics in {self._directory} are closed")
        lines, _ = _split(self.path.read_bytes())
        lines = [line for line in lines if line.strip()]
        rows = _parse(lines, self.path)
        seen = list(dict.fromkeys(str(row.get("phase")) for row in rows))
        if phases is None:
            names = list(dict.fromkeys([*seen, phase]))
            phases = [p for p in names if _belongs(p, [q for q in names if q != p]) is None]
        position = _belongs(phase, phases)
        if position is None:
            raise ValueError(f"phase: {phase!r} is not one of {', '.join(phases)}")
        order: dict[str, int] = {}
        for name in seen:
            index = _belongs(name, phases)
            if index is None:
                raise ValueError(f"phases: the file has {name!r}, not one of {', '.join(phases)}")
            order[name] = index
        kept = []
        for line, row in zip(lines, rows, strict=True):
            index = order[str(row.get("phase"))]
            if index < position or (index == position and row["step"] <= step):
                kept.append(line)
        for name, index in order.items():
            if index >= position:
                self._purge[name] = step + 1 if index == position else 0
        self._close_events()
        # Made beside the file and moved over it: a process that dies leaves the one or the other.
        new = self.path.with_suffix(".new")
        new.write_bytes(b"".join(line + b"\n" for line in kept))
        os.close(self._file)
        self._file = None
        os.replace(new, self.path)
        self._open()
        if self._tensorboard and (self._directory / "tensorboard").is_dir():
            for name in list(self._purge):
                if (self._directory / "tensorboard" / name).is_dir():
                    self._events(name)  # tells TensorBoard now, even if nothing more is written
        return len(rows) - len(kept)

    def _close_events(self) -> None:
        for writer in self._event_writers.values():
            writer.close()
        self._event_writers.clear()

    def close(self) -> None:
        """Closes the files. Closing twice is allowed."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._close_events()


# --- on the terminal -----------------------------------------------------------------------------


def _short(value: Any) -> str:
    """A number in at most four significant digits."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    if abs(number) >= 1e3:
        return f"{number:,.0f}" if abs(number) < 1e7 else f"{number:.3e}"
    return f"{number:.4g}" if abs(number) >= 1e-3 or number == 0 else f"{number:.2e}"


class Progress:
    """What `progress` yields."""

    def __init__(
        self,
        show: Callable[[int, str], None],
        print_line: Callable[[str], None],
        initial: int,
        fields: Sequence[str],
    ) -> None:
        self._show, self._print, self._fields = show, print_line, tuple(fields)
        self.completed = initial

    def advance(self, values: Mapping[str, Any] | None = None, *, steps: int = 1) -> None:
        """Counts `steps` more and shows those of `values` that are among the fields."""
        self.completed += steps
        shown = [(f, (values or {}).get(f)) for f in self._fields]
        self._show(self.completed, "  ".join(f"{f} {_short(v)}" for f, v in shown if v is not None))

    def print(self, text: str) -> None:
        """Prints above the bar."""
        self._print(text)


@contextlib.contextmanager
def progress(
    total: int,
    *,
    initial: int = 0,
    fields: Sequence[str] = ("reward", "kl", "entropy", "tokens/s"),
    description: str = "",
) -> Iterator[Progress]:
    """A progress bar with a few numbers; plain lines where the output is not a terminal.

    Leaving it, by an exception or ctrl-C too, gives the terminal its cursor back. Elsewhere (a
    file, a notebook, or without the rich package) it prints a line for every tenth of the way.

    Args:
      total: steps in all, at least `initial`.
      initial: steps already done, by the run this one goes on from.
      fields: names of the values to show, in order.
      description: what is going on.

    Yields:
      a `Progress`: `advance(values)` after every step.

    Raises:
      ValueError: counts out of range.
    """
    if initial < 0 or total < initial:
        raise ValueError(f"total: expected at least initial={initial} >= 0, got {total}")
    try:
        from rich.console import Console

        console = Console()
        terminal = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
    except ImportError:
        terminal = False
    if not terminal:
        yield _plain_progress(total, initial, fields, description)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn(
            "{task.fields[numbers]}",
            style="cyan",
            markup=False,
            table_column=Column(no_wrap=False),  # what is too narrow wraps here, not in the counts
        ),
    )
    with RichProgress(*columns, console=console, refresh_per_second=4) as bars:
        task = bars.add_task(description, total=total, completed=initial, numbers="")
        yield Progress(
            lambda done, numbers: bars.update(task, completed=done, numbers=numbers),
            lambda text: console.print(text, markup=False, highlight=False),
            initial,
            fields,
        )


def _plain_progress(total: int, initial: int, fields: Sequence[str], description: str) -> Progress:
    began = time.monotonic()
    last_tenth = 10 * initial // max(total, 1)

    def show(done: int, numbers: str) -> None:
        nonlocal last_tenth
        tenth = 10 * done // max(total, 1)
        if tenth <= last_tenth:
            return
        last_tenth = tenth
        head = f"{description}: " if description else ""
        seconds = time.monotonic() - began
        print(
            f"{head}{done}/{total} ({100 * done // max(total, 1)}%) {seconds:.0f} s"
            + (f"  {numbers}" if numbers else ""),
            file=sys.stdout,
            flush=True,
        )

    return Progress(show, lambda text: print(text, flush=True), initial, fields)


def summary_table(
    rows: Iterable[Mapping[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    title: str | None = None,
) -> Table:
    """A table of results for `rich.print`; numbers to four significant digits, right-aligned.

    Args:
      rows: one mapping per row; a missing value leaves its cell empty.
      columns: names in order; default: all, in the order they first appear.
      title: above the table.

    Raises:
      ImportError: without the rich package.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    if columns is None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        values = [row[name] for row in rows if row.get(name) is not None]
        numeric = bool(values) and not any(isinstance(value, str) for value in values)
        table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*(Text(_short(row.get(name))) for name in columns))
    return table


# --- learning curves -----------------------------------------------------------------------------

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
        x, y = (
            (np.asarray(column, float) for column in zip(*points, strict=True))
            if points
            else (
                np.zeros(0),
                np.zeros(0),
            )
        )
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
