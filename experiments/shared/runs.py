"""A run's directory: finding, claiming, describing and resuming it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

_Config = TypeVar("_Config")


def newest_run(root: pathlib.Path) -> pathlib.Path:
    """The run under `root` with the highest number."""
    found = sorted(p.parent for p in root.glob("[0-9]*/config.json"))
    if not found:
        raise FileNotFoundError(f"{root}: no run to resume here; start one without --resume")
    return found[-1]


def next_run(root: pathlib.Path) -> pathlib.Path:
    """The directory of the next run under `root`; not made yet."""
    numbers = [int(p.name) for p in root.glob("[0-9]*") if p.name.isdigit()]
    return root / f"{max(numbers, default=0) + 1:03d}"


def claim(directory: pathlib.Path, config: Any) -> None:
    """Makes a run's directory and writes its config, unless another run is there.

    Raises:
      FileExistsError: there is a run and `config.resume` is false.
    """
    path = directory / "config.json"
    if path.exists() and not config.resume:
        raise FileExistsError(
            f"{directory} already holds a run: pass --resume to continue it, or another --out"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(dataclasses.replace(config, resume=False)))


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file that is either there completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)


def curve(
    records: Sequence[Mapping[str, Any]], phase: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric in one phase of a run's records, for a plot."""
    rows = [r for r in records if r["phase"] == phase and name in r]
    return np.array([r["step"] for r in rows]), np.array([r[name] for r in rows])


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


def one_thread_per_virtual_device() -> None:
    """Has XLA compute on one thread for each CPU device, where several were asked for.

    Else all of its threads may wait, some in a collective for devices whose threads wait for parts
    of a product that no thread is left to compute: the program stands still, and XLA ends it after
    40 s. Takes effect before the first computation only.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    several = "xla_force_host_platform_device_count" in flags or "JAX_NUM_CPU_DEVICES" in os.environ
    if several and "xla_cpu_multi_thread_eigen" not in flags:
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
    import tyro

    one_thread_per_virtual_device()

    default = presets.get(peek(arguments, "--preset") or default_preset, presets[default_preset])
    if "--resume" in arguments:
        out = peek(arguments, "--out")
        directory = pathlib.Path(out) if out else newest_run(root)
        changes: dict[str, Any] = {"out": directory, "resume": True}
        default = dataclasses.replace(load_config(cls, directory), **changes)  # type: ignore[type-var]
    return tyro.cli(
        cls,
        args=arguments,
        default=default,
        prog=f"python -m experiments.{program}",
        description=description,
    )
