"""What every small-scale reproduction ends with: a table over seeds, verdicts, a plot, files."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

import pgjax as pg
from experiments.shared import command_line, runs

SECONDS_BETWEEN_LINES = 30.0  # of progress, in a log

_Config = TypeVar("_Config")
_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One part of what is to be shown, and what was seen."""

    text: str
    holds: bool
    seen: str


@dataclasses.dataclass
class Findings:
    """What an experiment returns.

    Attributes:
      title: of table and plot.
      table: method -> {column: one number per seed}.
      claims: judged on that table.
      panels: plot title -> {curve: (x, mean, low, high) or (x, y)}.
      x_label: of the plots.
    """

    title: str
    table: Mapping[str, Mapping[str, Float[np.ndarray, " S"]]]
    claims: Sequence[Claim]
    panels: Mapping[str, Mapping[str, tuple[Any, ...]]] = dataclasses.field(default_factory=dict)
    x_label: str = "step"


def band(steps: Any, curves: Float[np.ndarray, "S K"]) -> tuple[Any, Any, Any, Any]:
    """A curve for `Findings.panels`: mean over seeds, and one standard error to either side."""
    mean = curves.mean(0)
    error = curves.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else np.zeros_like(mean)
    return np.asarray(steps), mean, mean - error, mean + error


def smooth(curves: Float[np.ndarray, "S K"], width: int = 10) -> Float[np.ndarray, "S L"]:
    """Means over so many neighbouring steps, or what there is."""
    width = min(width, curves.shape[1])
    return np.stack([np.convolve(x, np.full(width, 1 / width), "valid") for x in curves])


def above(
    text: str, values: Float[np.ndarray, " S"], threshold: float, *, format: str = ".3f"
) -> Claim:
    """The mean over seeds is at least a threshold."""
    mean = float(np.mean(values))
    return Claim(text, mean >= threshold, f"{mean:{format}} (at least {threshold:{format}})")


def standard_error(values: Float[np.ndarray, " S"]) -> float:
    """Of the mean over seeds, of which there are at least two."""
    return float(values.std(ddof=1) / values.size**0.5)


def with_error(values: Float[np.ndarray, " S"], format: str = "+.4f") -> str:
    """The mean over seeds and its standard error, in words."""
    return f"{values.mean():{format}} ± {standard_error(values):{format.lstrip('+')}}"


def ahead(
    text: str,
    one: Float[np.ndarray, " S"],
    other: Float[np.ndarray, " S"],
    *,
    format: str = ".3f",
) -> Claim:
    """The difference, paired by seed, is above 0 by more than two standard errors of its mean."""
    gain = one - other
    holds = bool(gain.mean() > 2 * standard_error(gain))
    return Claim(text, holds, with_error(gain, f"+{format}"))


def track(items: Iterable[_Item], text: str = "methods") -> Iterator[_Item]:
    """The items one by one, with a progress bar on standard error while they last.

    Where that is no terminal, a line says how many are done, at most one in half a minute.
    """
    import rich.console
    import rich.progress

    todo = list(items)
    console = rich.console.Console(stderr=True)
    if console.is_terminal:
        yield from rich.progress.track(todo, text, console=console, transient=True)
        return
    start = said = time.monotonic()
    for done, item in enumerate(todo, 1):
        yield item
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            print(
                f"{text}: {done} of {len(todo)} done after {now - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            said = now


def main(
    name: str,
    config_class: type[_Config],
    run: Callable[[_Config], Findings],
    *,
    description: str | None,
    arguments: Sequence[str] | None = None,
    part: Callable[[_Config], str] | None = None,
) -> int:
    """Parses a config with `out`, runs, prints and saves; 0 if every claim holds, else 1.

    Args:
      name: of the module under `experiments`.
      config_class: a frozen dataclass; its `out` is the directory for results.
      run: the experiment.
      description: for `--help`.
      arguments: default: the command line's.
      part: names a directory below `out`, for experiments of several parts.
    """
    import rich

    config: Any = command_line.parse(
        config_class, name, description=description, arguments=arguments
    )
    try:
        found = run(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written. The same command starts again.", file=sys.stderr)
        return 130
    rows = []
    for method, columns in found.table.items():
        row: dict[str, Any] = {"method": method}
        for column, values in columns.items():
            row[column] = _with_error(np.asarray(values, float))
        rows.append(row)
    rich.print(pg.train.metrics.summary_table(rows, title=found.title))
    for claim in found.claims:
        mark = "[green]yes[/]" if claim.holds else "[red]no [/]"
        rich.print(f"{mark} {claim.text}: {claim.seen}")
    out = pathlib.Path(config.out, *([] if part is None else [part(config)]))
    out.mkdir(parents=True, exist_ok=True)
    runs.write_json(
        out / "results.json",
        {
            "config": dataclasses.asdict(config),
            "table": {
                method: {column: np.asarray(x).tolist() for column, x in columns.items()}
                for method, columns in found.table.items()
            },
            "claims": [dataclasses.asdict(claim) for claim in found.claims],
        },
    )
    files = [out / "results.json"]
    if found.panels:
        pg.train.metrics.plot_curves(
            found.panels, out / "curves.png", x_label=found.x_label, title=found.title, columns=2
        )
        files.append(out / "curves.png")
    for path in files:
        rich.print(f"  {path}")
    return 0 if all(claim.holds for claim in found.claims) else 1


def _with_error(values: Float[np.ndarray, " S"]) -> str:
    mean = np.mean(values)
    small = 0 < abs(mean) < 1e-3 or abs(mean) >= 1e5
    form = ".2e" if small else ".3f"
    if values.size < 2:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {standard_error(values):{form}}"
