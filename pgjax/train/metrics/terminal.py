"""On the terminal: a progress bar and a table of results."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table


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
    shown: bool = True,
) -> Iterator[Progress]:
    """A progress bar with a few numbers; plain lines where the output is not a terminal.

    Leaving it, by an exception or ctrl-C too, gives the terminal its cursor back. Elsewhere (a
    file, a notebook, or without the rich package) it prints a line for every tenth of the way.

    Args:
      total: steps in all, at least `initial`.
      initial: steps already done, by the run this one goes on from.
      fields: names of the values to show, in order.
      description: what is going on.
      shown: False prints nothing, for the processes of a job that are not the first.

    Yields:
      a `Progress`: `advance(values)` after every step.

    Raises:
      ValueError: counts out of range.
    """
    if initial < 0 or total < initial:
        raise ValueError(f"total: expected at least initial={initial} >= 0, got {total}")
    if not shown:
        yield Progress(lambda done, numbers: None, lambda text: None, initial, fields)
        return
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
