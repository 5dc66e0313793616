"""A run's directory: finding, claiming, describing and resuming it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

import pgjax as pg
from experiments.shared import command_line

_Config = TypeVar("_Config")


USER_ERRORS = (
    *(ValueError, ImportError, FileNotFoundError, FileExistsError),
    *(NotADirectoryError, PermissionError),
)
"""What an experiment says in one line: a mistake in its input, or in what it was given to use."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes, one command each; the directory of the run is on a disk they share."""

    coordinator: str | None = None
    """host:port for process 0 to listen on, or auto (Slurm, Open MPI, Kubernetes, Cloud TPU)."""
    count: int | None = None
    """How many there are; not needed with auto."""
    index: int | None = None
    """Which of them this is, from 0; not needed with auto."""


ALONE = Processes()
NON_FINITE = 3  # exit status


class Share(NamedTuple):
    """Rows of every batch that are this process's, and which of its equal parts they are."""

    rows: int
    part: int
    parts: int


def join(config: Any) -> None:
    """Makes this process one of a job's, if it is to be, and checks that all run the same.

    Only the first speaks: the others' standard output goes nowhere from here on.

    Raises:
      ValueError: processes that differ in configuration, code, versions or devices, saying how.
    """
    processes: Processes = config.processes
    pg.parallel.connect(processes.coordinator, count=processes.count, index=processes.index)
    if jax.process_count() == 1:
        return
    pg.parallel.check_same(
        {
            "config": dataclasses.asdict(dataclasses.replace(config, processes=ALONE)),
            "code": _code_version(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "devices": [device.device_kind for device in jax.local_devices()],
        }
    )
    if not pg.parallel.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def share(mesh: Mesh, name: str, size: int) -> Share:
    """This process's part of a batch of that size, for a loader.

    Raises:
      ValueError: the parts are not equal; `name` is what was to be set otherwise.
    """
    index, count = pg.parallel.process_shard(mesh)
    if size % count:
        raise ValueError(
            f"{name}: {size} rows cannot be cut into {count} equal parts, one for each process"
        )
    return Share(size // count, index, count)


def _code_version() -> str:
    """A digest of the library's source and of the experiments'."""
    digest = hashlib.sha256()
    for root in (pathlib.Path(pg.__file__).parent, pathlib.Path(__file__).parents[1]):
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def newest_run(root: pathlib.Path) -> pathlib.Path:
    """The run under `root` with the highest number."""
    found = sorted(p.parent for p in root.glob("[0-9]*/config.json"))
    if not found:
        raise FileNotFoundError(f"{root}: no run to resume here; start one without --resume")
    return found[-1]


def next_run(root: pathlib.Path) -> pathlib.Path:
    """The directory of the next run under `root`, the same for all processes; not made yet."""

    def number() -> int:
        numbers = [int(p.name) for p in root.glob("[0-9]*") if p.name.isdigit()]
        return max(numbers, default=0) + 1

    return root / f"{pg.parallel.on_first(number):03d}"


def claim(directory: pathlib.Path, config: Any) -> None:
    """Makes a run's directory and writes its config, unless another run is there.

    Raises:
      FileExistsError: there is a run and `config.resume` is false.
    """
    path = directory / "config.json"
    # What a run is does not depend on how many processes go on with it.
    alone = {"processes": ALONE} if hasattr(config, "processes") else {}
    stored = dataclasses.replace(config, resume=False, **alone)

    def make() -> None:
        if path.exists() and not config.resume:
            raise FileExistsError(
                f"{directory} already holds a run: pass --resume to continue it, or another --out"
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(stored))

    pg.parallel.on_first(make)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file that is either there completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)


def measured_once(path: pathlib.Path, measure: Callable[[], Any]) -> Any:
    """JSON data kept in a file: what is there, or else what `measure` now returns.

    The first process of a job reads and writes; all of them measure, or none.
    """
    stored = pg.parallel.on_first(lambda: json.loads(path.read_text()) if path.exists() else None)
    if stored is None:
        # As it will be read back, so that a resumed run sees what this one does.
        stored = json.loads(json.dumps(measure(), default=str))
        pg.parallel.on_first(lambda: write_json(path, stored))
    return stored


def curve(
    records: Sequence[Mapping[str, Any]], phase: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric in one phase of a run's records, for a plot."""
    rows = [r for r in records if r["phase"] == phase and name in r]
    return np.array([r["step"] for r in rows]), np.array([r[name] for r in rows])


def profile(directory: pathlib.Path, first: int | None) -> pg.train.Profile | None:
    """Three steps to trace from `first` on, if one is given."""
    return None if first is None else pg.train.Profile(directory / "profile", first)


def time_shares(records: Sequence[Mapping[str, Any]], phase: str) -> dict[str, float]:
    """What the steps of a phase spent their time on, as shares; of the median step."""
    rows = [r for r in records if r["phase"] == phase and r["seconds"] > 0]
    names = sorted({n for r in rows for n in r if n.startswith("seconds_")} - {"seconds_compiling"})
    return {
        name.removeprefix("seconds_"): float(
            np.median([r.get(name, 0.0) / r["seconds"] for r in rows])
        )
        for name in names
    }


def shares_line(shares: Mapping[str, float]) -> str:
    return "of a step: " + ", ".join(f"{name} {100 * x:.0f}%" for name, x in shares.items())


def skipped(directory: pathlib.Path, phase: str) -> pathlib.Path:
    """Where a phase's batches go whose update was skipped."""
    return directory / "skipped" / phase


def explain(
    stop: pg.train.NonFinite, *, program: str, out: pathlib.Path | None, root: pathlib.Path
) -> int:
    """Says why training stopped, what the batches have to do with it and how to go on.

    Returns:
      the exit status.
    """
    directory = newest_run(root) if out is None else out
    where = "" if out is None else f" --out {out}"
    left = (
        "The run goes on from its newest checkpoint, before they were lost"
        if stop.lost
        else "The parameters are those before the skipped steps"
    )
    print(
        f"\n{stop}.\n{pg.train.describe_skipped(skipped(directory, stop.phase))}\n"
        f"Read a batch with pgjax.train.load_skipped. {left}; continue with:\n"
        f"  python -m experiments.{program} --resume{where}"
    )
    return NON_FINITE


def load_config(cls: type[_Config], directory: pathlib.Path) -> _Config:
    """The config that a run was started with."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no run to resume here (no config.json)")
    return _from_json(cls, json.loads(path.read_text()))


def _from_json(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
    hints = typing.get_type_hints(cls)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"config.json: unknown field {name!r}")
        hint = hints[name]
        options = (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            value = _from_json(hint, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and pathlib.Path in options:
            value = pathlib.Path(value)
        made[name] = value
    return cls(**made)


def peek(arguments: list[str], flag: str) -> str | None:
    """The value of a flag, before the full parser knows its defaults."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None


def spare_threads() -> None:
    """Keeps XLA's threads from all waiting for each other, where several CPU devices are asked for.

    A thread waits in a collective until the other devices join it. Where every thread waits, some
    for parts of a product and some in different collectives, none is left to go on: the program
    stands still, and XLA ends it after 40 s. So each device computes on one thread, and there are
    eight threads for each, 64 at least. Takes effect before the first computation only.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
    devices = asked[1] if asked else os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if devices.isdecimal():
        threads = max(64, 8 * int(devices))
        os.environ.setdefault("NPROC", str(threads))  # the size of XLA's pool of threads
        if "xla_cpu_multi_thread_eigen" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def parse(
    cls: type[_Config],
    arguments: list[str],
    *,
    presets: Mapping[str, _Config],
    default_preset: str,
    root: pathlib.Path,
    program: str,
    description: str | None,
) -> _Config:
    """The config of a command line: a preset's (or the resumed run's) defaults, then the flags."""
    spare_threads()

    default = presets.get(peek(arguments, "--preset") or default_preset, presets[default_preset])
    if "--resume" in arguments:
        out = peek(arguments, "--out")
        directory = pathlib.Path(out) if out else newest_run(root)
        changes: dict[str, Any] = {"out": directory, "resume": True}
        default = dataclasses.replace(load_config(cls, directory), **changes)  # type: ignore[type-var]
    return command_line.parse(
        cls, program, description=description, arguments=arguments, default=default
    )
