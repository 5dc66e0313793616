"""What every benchmark shares: fair timing of two callables in turn, and rows of one table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: `ratio` is our figure divided by the peer's (below 1 is better for us)."""

    name: str
    peer: str
    ours: str
    theirs: str
    ratio: float
    max_abs_error: float | None = None
    limit: float | None = None

    @property
    def within_limit(self) -> bool:
        return self.limit is None or self.ratio <= self.limit


def paired_seconds(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, runs: int = 15
) -> tuple[float, float, float]:
    """Median seconds of each callable, run in turn A B A B ..., and the median of paired ratios."""

    def once(f: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(f())
        return time.perf_counter() - start

    once(ours), once(theirs), once(ours), once(theirs)  # compile, then warm the caches
    pairs = np.array([(once(ours), once(theirs)) for _ in range(runs)])
    a, b = np.median(pairs, axis=0)
    return float(a), float(b), float(np.median(pairs[:, 0] / pairs[:, 1]))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def rate(count: int, unit: str) -> Callable[[float], str]:
    """Shows the seconds that `count` of something take as so many a second."""
    return lambda seconds: f"{count / seconds:,.0f} {unit}/s"


def paired(
    name: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    runs: int,
    shown: Callable[[float], str],
    max_abs_error: float | None = None,
    limit: float | None = None,
) -> Row:
    """The row of two callables that run in turn, their median seconds as `shown` puts them."""
    mine, other, ratio = paired_seconds(ours, theirs, runs=runs)
    return Row(name, peer, shown(mine), shown(other), ratio, max_abs_error, limit)


def table(rows: list[Row]) -> str:
    """The rows as aligned text; needs nothing but the standard library."""
    header = ("what", "ours", "peer", "theirs", "ratio", "limit", "max |difference|")
    lines = [header] + [
        (
            row.name,
            row.ours,
            row.peer,
            row.theirs,
            f"{row.ratio:.3g}",
            "" if row.limit is None else f"{row.limit:g}",
            "" if row.max_abs_error is None else f"{row.max_abs_error:.1e}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * sum(widths, 2 * len(widths) - 2), *text[1:]])


def to_json(rows: list[Row], device: str) -> str:
    """The rows and what they were measured on."""
    content = {
        "device": device,
        "jax": jax.__version__,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return json.dumps(content, indent=2)


def finish(rows: list[Row], out: pathlib.Path | None, device: str) -> int:
    """Prints the table and what missed its limit, writes the JSON; the exit status."""
    print(table(rows))
    missed = [row for row in rows if not row.within_limit]
    for row in missed:
        print(f"MISSED: {row.name} against {row.peer}: {row.ratio:.2f}, limit {row.limit}")
    if out is not None:
        out.write_text(to_json(rows, device) + "\n")
        print(f"  {out}")
    return 1 if missed else 0


def main(
    name: str, description: str | None, rows: Callable[[], list[Row]], arguments: list[str] | None
) -> int:
    """The command line of a benchmark without options of its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.benchmarks.{name}", description=description
    )
    parser.add_argument("--out", type=pathlib.Path, help="also write the rows to this JSON file")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}: {device.device_kind}")
    return finish(rows(), options.out, device.device_kind)
