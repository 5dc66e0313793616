"""Runs that are killed, and verifiers that misbehave: what that costs and what it leaves.

`python -m experiments.benchmarks.reliability` kills a small run of the main job at random moments,
while a checkpoint is written too, goes on with it each time, and compares how it ends with the run
that was left alone, bit by bit: on one process and on two. Then a training step is given verifiers
that hang, raise, exit, flood memory, print and leave processes. Exits with 1 where a run differs,
more work is lost than since the last checkpoint, a sample is not accounted for, a step takes longer
than promised or something is left behind. Needs Linux.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import pgjax as pg
from experiments.shared import command_line, kills, reproduction, runs, torture
from experiments.shared.reproduction import Claim

MEMORY_LIMIT = 64 << 20  # bytes by which a step may seem to grow this process


@dataclasses.dataclass(frozen=True)
class Config:
    """What is done how often."""

    kills: int = 50
    """For each number of processes."""
    processes: tuple[int, ...] = (1, 2)
    """Of a run; a kill is of one of them."""
    seed: int = 0
    """Of the moments."""
    kinds: tuple[torture.Kind, ...] = torture.KINDS
    """Of misbehaving verifiers."""
    seconds: float = 1.0
    """Time limit of a verdict."""
    only: Literal["kills", "torture"] | None = None
    """One part; default: both."""
    out: pathlib.Path = pathlib.Path("runs/reliability")
    """Directory for results and runs, which stay there with what they compiled."""

    def __post_init__(self) -> None:
        if self.kills < 1:
            raise ValueError(f"kills: expected at least 1, got {self.kills}")
        if not self.processes or min(self.processes) < 1:
            raise ValueError(f"processes: expected numbers of at least 1, got {self.processes}")
        if not self.seconds > 0:
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")


def kill_rows(tallies: Sequence[kills.Tally], seconds: Sequence[float]) -> list[dict[str, Any]]:
    """A table's rows: one for each count, with a column for each number of processes."""
    facts = []
    for tally, taken in zip(tallies, seconds, strict=True):
        every = tally.kills
        facts.append(
            {
                "kills": len(every),
                "  in the warm-up": sum(k.phase == "warm-up" for k in every),
                "  in the reinforcement": sum(k.phase == "reinforcement" for k in every),
                "  while a checkpoint was written": sum(k.writing for k in every),
                "  before the first checkpoint": sum(k.saved is None for k in every),
                "  before a first step since the start": sum(k.idle for k in every),
                "others that ended by themselves": sum(tally.processes - 1 - k.left for k in every),
                "others that had to be killed too": sum(k.left for k in every),
                "runs ended": tally.runs,
                "steps lost by a kill, mean": sum(tally.lost) / len(tally.lost),
                "steps lost by a kill, most": max(tally.lost),
                "steps between checkpoints": kills.INTERVAL,
                "went on from before a checkpoint": len(tally.too_early),
                "differences from the whole run": len(tally.mismatches),
                "minutes": taken / 60,
            }
        )
    columns = [_processes(tally.processes) for tally in tallies]
    return [
        {"": name, **{c: f[name] for c, f in zip(columns, facts, strict=True)}} for name in facts[0]
    ]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def kill_claims(tally: kills.Tally, wanted: int) -> list[Claim]:
    """What is to hold for one number of processes."""
    name = _processes(tally.processes)
    # A checkpoint is written while the next steps are taken; the next one waits for its end.
    most = 2 * kills.INTERVAL
    return [
        Claim(
            f"{name}: every killed run ends as the one left alone, bit by bit",
            tally.runs > 0 and len(tally.kills) == wanted and not tally.mismatches,
            f"{tally.runs} runs, {len(tally.kills)} kills; {_some(tally.mismatches)}",
        ),
        Claim(
            f"{name}: none goes on from before its newest complete checkpoint",
            not tally.too_early and len(tally.lost) == wanted,
            _some(tally.too_early),
        ),
        Claim(
            f"{name}: none loses more than the steps since the last checkpoint and those while it "
            f"was written, {most}",
            max(tally.lost) <= most,
            f"at most {max(tally.lost)}",
        ),
    ]


def _some(found: Sequence[str]) -> str:
    more = [f"{len(found) - 5} more"] if len(found) > 5 else []
    return "; ".join([*found[:5], *more]) or "none"


def torture_row(outcome: torture.Outcome) -> dict[str, Any]:
    return {
        "verifier": outcome.name,
        "bad": f"{outcome.bad}/{outcome.samples}",
        "NaN": outcome.invalid,
        "odd": len(outcome.unaccounted),
        "left": len(outcome.left),
        "MiB": f"{outcome.memory / 2**20:+.1f}",
        "s": f"{outcome.seconds:.2f}",
        "bound": f"{outcome.bound:.2f}",
    }


def torture_claims(outcomes: Sequence[torture.Outcome]) -> list[Claim]:
    late = [o.name for o in outcomes if o.seconds > o.bound]
    grown = [o.name for o in outcomes if o.memory > MEMORY_LIMIT]
    unaccounted = [f"{o.name}: {what}" for o in outcomes for what in o.unaccounted]
    left = [f"{o.name}: {what}" for o in outcomes for what in o.left]
    return [
        Claim("every sample is accounted for", not unaccounted, _some(unaccounted)),
        Claim("nothing is left behind", not left, _some(left)),
        Claim("no step takes longer than its bound", not late, _some(late)),
        Claim(f"none grows the process by {MEMORY_LIMIT >> 20} MiB", not grown, _some(grown)),
    ]


def run_kills(config: Config) -> tuple[list[kills.Tally], list[float]]:
    tallies, seconds = [], []
    for count in config.processes:
        moments = kills.moments(random.Random(config.seed), config.kills)
        began = time.monotonic()
        tallies.append(
            kills.run(
                config.out,
                reproduction.track(moments, f"kills, {_processes(count)}"),
                processes=count,
                seed=config.seed,
                environment=kills.environment(config.out.absolute()),
            )
        )
        seconds.append(time.monotonic() - began)
    return tallies, seconds


def run_torture(config: Config) -> list[torture.Outcome]:
    if sys.platform != "linux":
        raise ValueError("torture: needs Linux, whose /proc tells what is left behind")
    rack = torture.Rack(torture.Limits(seconds=config.seconds, memory_bytes=1 << 28))
    steps: list[tuple[str, tuple[torture.Kind, ...]]] = [
        ("behaves", ()),
        *((torture.MEANINGS[kind], (kind,)) for kind in config.kinds),
        ("all of these", config.kinds),
    ]
    return [rack.torture(*step) for step in reproduction.track(steps, "verifiers")]


def main(arguments: Sequence[str] | None = None) -> int:
    import rich.markup

    try:
        config = command_line.parse(
            Config, "benchmarks.reliability", description=__doc__, arguments=arguments
        )
        config.out.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"config": dataclasses.asdict(config)}
        claims: list[Claim] = []
        if config.only != "torture":
            tallies, seconds = run_kills(config)
            rich.print(pg.train.metrics.summary_table(kill_rows(tallies, seconds), title="Kills"))
            found["kills"] = [dataclasses.asdict(tally) for tally in tallies]
            claims += [c for tally in tallies for c in kill_claims(tally, config.kills)]
        if config.only != "kills":
            outcomes = run_torture(config)
            title = "One training step; odd: samples not accounted for, left: what is left behind"
            rich.print(pg.train.metrics.summary_table(map(torture_row, outcomes), title=title))
            found["torture"] = [dataclasses.asdict(outcome) for outcome in outcomes]
            claims += torture_claims(outcomes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written.", file=sys.stderr)
        return 130
    for claim in claims:
        mark = "[green]yes[/]" if claim.holds else "[red]no [/]"
        rich.print(mark, rich.markup.escape(f"{claim.text}: {claim.seen}"))
    runs.write_json(
        config.out / "results.json",
        {**found, "claims": [dataclasses.asdict(claim) for claim in claims]},
    )
    rich.print(f"  {config.out / 'results.json'}")
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs it started end with it
    sys.exit(main())
