"""Writing of safetensors files, one tensor at a time, and of directories that appear at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgjax.models.pretrained.tensors import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: np.dtype) -> str:
    """safetensors' name of a dtype; ValueError where parameters cannot have it."""
    if dtype not in _NAMES:
        raise ValueError(f"dtype: expected one of {', '.join(str(d) for d in _NAMES)}, got {dtype}")
    return _NAMES[dtype]


def write_file(
    file: Path,
    tensors: Sequence[Planned],
    values: Callable[[Planned], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """One safetensors file; each tensor's values are asked for when they are written."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values begin at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors:
            value = values(tensor)
            assert value.shape == tensor.shape and value.dtype == tensor.dtype, tensor
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def sharded(tensors: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    """The tensors in order, as many to a file as fit; one larger than that has its own."""
    files: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.size > max_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.size
    return files


def file_names(count: int) -> list[str]:
    """What Hugging Face calls `count` files."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(directory: Path, files: Sequence[Sequence[Planned]]) -> None:
    """The index of several files."""
    names = file_names(len(files))
    index = {
        "metadata": {"total_size": sum(tensor.size for file in files for tensor in file)},
        "weight_map": {
            tensor.name: name for name, file in zip(names, files, strict=True) for tensor in file
        },
    }
    write_json(directory / INDEX, index)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Indented JSON, on disk when this returns."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A directory to write into that takes the name `path` once everything is in it.

    Where something fails it is removed, and what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        if path.exists() and any(path.iterdir()):
            old = path.with_name(f"{temporary.name}.old")
            path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            temporary.replace(path)  # also over an empty directory
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_file(file: Path, write: Callable[[Path], None]) -> None:
    """A file written under another name and then renamed, so that it is never there by half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
