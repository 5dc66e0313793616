"""A checkpoint's own files: what is known of it, and the list that tells damage."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from pgjax.train.checkpoints.errors import CheckpointError, Damaged
from pgjax.train.checkpoints.leaves import Leaf, Name

INFO_FILE = "info.json"
TEMPORARY = ".orbax-checkpoint-tmp"
_FORMAT = 1
_FILES_FILE = "files.json"
_CHECKSUM_LIMIT = 4 * 2**30  # bytes; of larger checkpoints only the sizes are compared


class Info(NamedTuple):
    """What is known of a checkpoint beside its arrays."""

    metadata: dict[str, Any]
    metrics: dict[str, Any]
    leaves: dict[Name, Leaf]


def make_info(
    step: int,
    metadata: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    leaves: Mapping[Name, Leaf],
) -> dict[str, Any]:
    """The JSON data that `read_info` reads; ValueError for what JSON does not have."""
    return {
        "format": _FORMAT,
        "step": step,
        "metrics": _numbers(metrics),
        "metadata": _plain(metadata or {}, "metadata"),
        "leaves": list(leaves.items()),
    }


def _plain(value: Any, where: str) -> Any:
    """A copy of JSON data, with NumPy and JAX scalars as numbers; ValueError for anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is not a string, as JSON wants")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
        return np.asarray(value).item()
    raise ValueError(f"{where}: a {type(value).__name__} cannot be written as JSON")


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    result = {}
    for name, value in (metrics or {}).items():
        try:
            result[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metrics[{name!r}]: expected a number, got {value!r}") from error
    return result


def read_info(directory: epath.Path) -> Info:
    """What was known when the checkpoint was saved; raises `Damaged` when it cannot be read."""
    try:
        info = json.loads((directory / "info" / INFO_FILE).read_text())
        if info["format"] > _FORMAT:
            raise CheckpointError(
                f"{directory}: written in format {info['format']}, this version reads {_FORMAT}"
            )
        return Info(
            metadata=dict(info["metadata"]),
            metrics=dict(info["metrics"]),
            leaves={
                tuple(name): Leaf(
                    where, dtype, tuple(shape), None if data is None else tuple(data), impl
                )
                for name, (where, dtype, shape, data, impl) in info["leaves"]
            },
        )
    except OSError as error:
        raise Damaged(f"file info/{INFO_FILE} cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"file info/{INFO_FILE} is not valid ({error})") from error


def list_files(directory: epath.Path) -> None:
    """Writes the list of a checkpoint's files into it, before the rename that makes it count."""
    sizes = {name: (directory / name).stat().length for name in _files(directory)}
    checked = sum(sizes.values()) <= _CHECKSUM_LIMIT
    listing = {
        name: [size, _checksum(directory / name) if checked else None]
        for name, size in sizes.items()
    }
    (directory / _FILES_FILE).write_text(json.dumps(listing))


def verify(directory: epath.Path) -> bool:
    """Whether there is a list of files; raises `Damaged` when they are not as listed."""
    path = directory / _FILES_FILE
    if not path.exists():
        return False
    try:
        listing = json.loads(path.read_text())
        for name, (size, crc) in listing.items():
            file = directory / name
            if not file.exists():
                raise Damaged(f"file {name} is missing")
            if file.stat().length != size:
                raise Damaged(f"file {name} has {file.stat().length} bytes, expected {size}")
            if crc is not None and _checksum(file) != crc:
                raise Damaged(f"file {name} does not match its checksum")
    except (ValueError, TypeError, AttributeError) as error:
        raise Damaged(f"file {_FILES_FILE} is unreadable ({error})") from error
    return True


def _files(directory: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names of all files of the sub-directories, sorted."""
    for child in sorted(directory.iterdir(), key=lambda p: p.name):
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        elif prefix:  # files beside the sub-directories are Orbax's and change when it commits
            yield f"{prefix}{child.name}"


def _checksum(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc
