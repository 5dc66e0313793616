"""A run of the main job killed again and again, beside one that was left alone."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from pgjax.train.checkpoints import manager
from pgjax.train.checkpoints.files import TEMPORARY
from pgjax.train.metrics import repeats

ROOT = pathlib.Path(__file__).parents[2]
WARMUP_STEPS, RL_STEPS, INTERVAL = 40, 60, 3
# Random rewards, since such a model earns no others: without any, reinforcement would leave the
# parameters as they are, and every run would end the same.
TINY = f"""
    --model.hidden-size 16 --model.num-layers 2 --model.mlp-size 32 --model.num-heads 2
    --model.num-kv-heads 2 --warmup.steps {WARMUP_STEPS} --warmup.batch-size 8
    --warmup.levels 1 2 3 --warmup.microbatches 2 --rl.steps {RL_STEPS} --rl.prompts 4
    --rl.samples 4 --rl.levels 1 2 --rl.microbatches 2 --rl.learning-rate 1e-3 --reward random
    --objective-options kl_coefficient=0.1 --evaluation.levels 1 2 --evaluation.test-prompts 4
    --evaluation.validation-prompts 4 --evaluation.every 8 --checkpoint-every {INTERVAL}
    --show-every 0
""".split()
PHASES = {"warmup": 0, "warmed_up": 0, "rl": WARMUP_STEPS}  # steps of the run before each
LONGEST_SITTING = 900.0  # seconds; no machine is that slow

When = Literal["step", "checkpoint", "start"]


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: after so many steps or started checkpoints, or in this part of the start."""

    when: When
    count: int
    delay: float


def moments(rng: random.Random, kills: int) -> list[Moment]:
    """A third each: before a first step, while a checkpoint is written, between any two steps."""
    every: list[When] = ["start", "checkpoint", "step"]
    kinds = (every * -(-kills // 3))[1:kills]
    rng.shuffle(kinds)
    kinds.insert(0, "start")  # or hardly any would come before the first checkpoint
    made = {
        "step": lambda: Moment("step", rng.randint(1, 4 * INTERVAL), 0.1 * rng.random()),
        "checkpoint": lambda: Moment("checkpoint", rng.randint(1, 3), 0.05 * rng.random()),
        "start": lambda: Moment("start", 0, rng.random()),
    }
    return [made[kind]() for kind in kinds]


def environment(shared: pathlib.Path) -> dict[str, str]:
    """For all processes of a benchmark: one data set, and one cache of compiled programs.

    The cache makes a start seconds instead of a minute, so that fifty of them are possible.
    """
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TFDS_DATA_DIR": str(shared / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(shared / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


class Sitting:
    """The processes of a run from one start to their end; a context that leaves none behind."""

    def __init__(self, directory: pathlib.Path, count: int, environment: Mapping[str, str]) -> None:
        """Starts the run in `directory`, or goes on with it."""
        resumed = (directory / "config.json").exists()
        arguments = ["--out", str(directory), *(["--resume"] if resumed else TINY)]
        self.log = directory.with_suffix(".log")
        address = f"127.0.0.1:{_free_port()}"
        with self.log.open("w") as output:
            self.processes = [
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "experiments.grpo_random_calculation", *arguments),
                        *(_member(address, count, index) if count > 1 else ()),
                    ],
                    cwd=ROOT,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for index in range(count)
            ]

    def __enter__(self) -> Sitting:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def running(self) -> bool:
        """Whether any does; RuntimeError where one failed."""
        codes = [process.poll() for process in self.processes]
        if any(codes):
            raise RuntimeError(f"the main job failed, {codes}: {self.log.read_text()[-3000:]}")
        return None in codes

    def finish(self) -> None:
        """Waits for the end of the run."""
        deadline = time.monotonic() + LONGEST_SITTING
        while self.running():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the main job hangs: {self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def kill(self, rng: random.Random, patience: float) -> int:
        """Kills one at random, the others if they still run afterwards; how many of them did."""
        rng.choice(self.processes).kill()
        deadline = time.monotonic() + patience
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
        left = sum(process.poll() is None for process in self.processes)
        self.__exit__()
        return left


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _member(address: str, count: int, index: int) -> tuple[str, ...]:
    return (
        *("--processes.coordinator", address, "--processes.count", str(count)),
        *("--processes.index", str(index)),
    )


class Files:
    """What a run's directory tells of it, while it runs and afterwards."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.log = directory / "metrics.jsonl"

    def lines(self) -> list[bytes]:
        """Whole lines of the records."""
        return self.log.read_bytes().split(b"\n")[:-1] if self.log.exists() else []

    def at(self) -> int:
        """Steps of the run, warm-up included, that the records hold."""
        if not self.log.exists():
            return 0
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 14)))
            last = file.read().split(b"\n")[:-1][-1:]
        return position(last[0]) if last else 0

    def version(self) -> tuple[int, int]:
        """Changes when a resumed run drops records, or writes one."""
        try:
            status = self.log.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns

    def complete(self, phase: str) -> list[int]:
        """Steps of the run at which a phase has a complete checkpoint."""
        return [PHASES[phase] + int(name) for name in self._names(phase) if name.isdigit()]

    def unfinished(self) -> set[str]:
        """Names of checkpoints that are being written, or whose process died at that."""
        names = [f"{phase}/{name}" for phase in PHASES for name in self._names(phase)]
        return {name for name in names if TEMPORARY in name}

    def _names(self, phase: str) -> list[str]:
        try:
            return os.listdir(self.directory / "checkpoints" / phase)
        except FileNotFoundError:
            return []

    def listing(self) -> set[str]:
        """Names of all that is there but TensorBoard's files, which go by the second."""
        return {
            str(path.relative_to(self.directory))
            for pattern in ("*", "checkpoints/*", "checkpoints/*/*")
            for path in self.directory.glob(pattern)
        }


def position(line: bytes) -> int:
    """Steps of the run at a record."""
    record = json.loads(line)
    return int(record["step"]) + PHASES[record["phase"].removesuffix("_evaluation")]


class Watch:
    """Waits for moments.

    Attributes:
      start_seconds: about how long a sitting takes until its first step; learned on the way.
    """

    def __init__(self) -> None:
        self.start_seconds = 10.0

    def wait(self, sitting: Sitting, files: Files, moment: Moment) -> bool:
        """Returns when the moment has come; False if the run ended before."""
        began = time.monotonic()
        first = files.version()
        base: int | None = None
        known = files.unfinished()
        started = steps = 0
        while sitting.running():
            seconds = time.monotonic() - began
            if seconds > LONGEST_SITTING:
                raise RuntimeError(f"the main job hangs: {sitting.log.read_text()[-3000:]}")
            if moment.when == "start":
                come = seconds >= moment.delay * self.start_seconds
            else:
                if base is None and files.version() != first:
                    base = files.at()
                if base is not None and files.at() > base:
                    if not steps:
                        self.start_seconds = seconds
                    steps = files.at() - base
                now = files.unfinished()
                started, known = started + len(now - known), now
                come = moment.count <= (steps if moment.when == "step" else started)
            if come:
                if moment.when != "start":
                    time.sleep(moment.delay)
                return sitting.running()
            # A checkpoint takes tens of milliseconds.
            time.sleep(0.05 if moment.when == "start" else 0.004)
        if moment.when == "start":  # or runs would end before it again and again
            self.start_seconds = min(self.start_seconds, 0.5 * (time.monotonic() - began))
        return False


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
      at: steps of the run that were done.
      saved: the newest step with a complete checkpoint, None where there was none.
      phase: "warm-up" or "reinforcement".
      writing: whether a checkpoint was being written.
      idle: whether the sitting had not come to a step yet.
      left: other processes of the job that had to be killed too.
    """

    at: int
    saved: int | None
    phase: str
    writing: bool
    idle: bool
    left: int


@dataclasses.dataclass
class Tally:
    """What became of all kills on so many processes.

    Attributes:
      processes: of each sitting.
      kills: all of them.
      runs: that came to their end.
      lost: steps of each kill that were done again.
      too_early: what went on from before its newest checkpoint.
      mismatches: what differs from the run that was left alone.
    """

    processes: int
    kills: list[Kill] = dataclasses.field(default_factory=list)
    runs: int = 0
    lost: list[int] = dataclasses.field(default_factory=list)
    too_early: list[str] = dataclasses.field(default_factory=list)
    mismatches: list[str] = dataclasses.field(default_factory=list)


def whole_run(directory: pathlib.Path, count: int, environment: Mapping[str, str]) -> pathlib.Path:
    """A run that is left alone."""
    with Sitting(directory, count, environment) as sitting:
        sitting.finish()
    warmed, trained = (final_arrays(directory, phase) for phase in ("warmed_up", "rl"))
    # Else it would not matter from where reinforcement went on.
    for name, value in warmed.items():
        if np.array_equal(value, trained[f"['params']['decoder']{name}"]):
            raise RuntimeError(f"reinforcement did not change {name}")
    return directory


def run(
    out: pathlib.Path,
    kills: Iterable[Moment],
    *,
    processes: int,
    seed: int,
    environment: Mapping[str, str],
    patience: float = 15.0,
) -> Tally:
    """Kills runs at these moments and goes on with them, and compares how they end.

    Args:
      out: directory for the runs, `whole-<processes>` and `killed-<processes>-<number>`; what is
        there under these names is replaced.
      kills: in order; one run after the other is started until all are spent.
      processes: of each run.
      seed: of the choice among processes.
      environment: from `environment`.
      patience: seconds that a job's other processes have to end by themselves.

    Raises:
      RuntimeError: a sitting fails or hangs.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob(f"whole-{processes}"), *out.glob(f"killed-{processes}-*")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    whole = whole_run(out / f"whole-{processes}", processes, environment)
    rng = random.Random(seed)
    tally = Tally(processes)
    watch = Watch()
    run = _Run(out / f"killed-{processes}-1", tally)
    for moment in kills:
        while True:
            with Sitting(run.files.directory, processes, environment) as sitting:
                killed = watch.wait(sitting, run.files, moment)
                left = sitting.kill(rng, patience) if killed else 0
            run.sat(killed, left)
            if killed:
                break
            tally.mismatches += differences(whole, run.files.directory)
            tally.runs += 1
            run = _Run(out / f"killed-{processes}-{tally.runs + 1}", tally)
    if run.killed:
        with Sitting(run.files.directory, processes, environment) as sitting:
            sitting.finish()
        run.sat(False, 0)
        tally.mismatches += differences(whole, run.files.directory)
        tally.runs += 1
    return tally


class _Run:
    """A run's sittings, and from where each went on."""

    def __init__(self, directory: pathlib.Path, tally: Tally) -> None:
        self.files = Files(directory)
        self.tally = tally
        self.killed = False
        self._waiting: list[Kill] = []  # after which no sitting has come to go on yet
        self._lines: list[bytes] = []
        self._version = self.files.version()
        self._unfinished: set[str] = set()

    def sat(self, killed: bool, left: int) -> None:
        """A sitting is over."""
        files = self.files
        version, lines, unfinished = files.version(), files.lines(), files.unfinished()
        # A record tells how long its step took: that of a step done again differs.
        pairs = zip(self._lines, lines, strict=False)
        kept = [old for old, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if version != self._version or not killed:
            self._account(position(kept[-1]) if kept else 0)
        idle = len(lines) == len(kept)
        if killed:
            kill = Kill(
                at=files.at(),
                saved=max((s for phase in PHASES for s in files.complete(phase)), default=None),
                phase="reinforcement" if files.complete("warmed_up") else "warm-up",
                # What is left of an earlier kill is there until the next sitting opens it.
                writing=bool(unfinished - self._unfinished if idle else unfinished),
                idle=idle,
                left=left,
            )
            self.killed = True
            self._waiting.append(kill)
            self.tally.kills.append(kill)
        self._version, self._lines, self._unfinished = version, lines, unfinished

    def _account(self, went_on_from: int) -> None:
        for i, kill in enumerate(self._waiting):
            if went_on_from < (kill.saved or 0):
                self.tally.too_early.append(
                    f"{self.files.directory.name}: killed at {kill.at} with a checkpoint of "
                    f"{kill.saved}, went on from {went_on_from}"
                )
            # Later ones found nothing more done than the first.
            self.tally.lost.append(kill.at - went_on_from if i == 0 else 0)
        self._waiting.clear()


def final_arrays(directory: pathlib.Path, phase: str) -> dict[str, np.ndarray]:
    """Every array of a phase's last checkpoint, by name."""
    root = directory.resolve() / "checkpoints" / phase  # Orbax finds nothing at relative paths
    path = root / max((p.name for p in root.iterdir() if p.name.isdigit()), key=int) / "state"
    reader = ocp.PyTreeCheckpointer()
    with manager.quiet():
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = reader.restore(path, restore_args=as_numpy)
    return {
        jax.tree_util.keystr(name): np.asarray(value)
        for name, value in jax.tree_util.tree_leaves_with_path(found)
    }


def differences(whole: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What differs between two runs that ended, but for times; none is what one hopes for."""
    found = []
    for phase in ("warmed_up", "rl"):
        want, got = (final_arrays(directory, phase) for directory in (whole, other))
        found += [
            f"{phase}{name}" for name in sorted(want.keys() | got.keys())
            if name not in want or name not in got or not _same_bits(want[name], got[name])
        ]  # fmt: skip
    records = [
        [_untimed(line) for line in Files(directory).lines()] for directory in (whole, other)
    ]
    if len(records[0]) != len(records[1]):
        found.append(f"{len(records[1])} records, expected {len(records[0])}")
    found += [
        f"record {want['phase']} {want['step']}: {got}"
        for want, got in zip(*records, strict=False)
        if want != got
    ]
    for name in ("test_before.json", f"test_after_{RL_STEPS}.json"):
        if (whole / name).read_text() != (other / name).read_text():
            found.append(name)
    listings = [Files(directory).listing() for directory in (whole, other)]
    found += [f"file {name}" for name in sorted(listings[0] ^ listings[1])]
    return [f"{other.name}: {what}" for what in found]


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _untimed(line: bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(line).items() if repeats(name)}
