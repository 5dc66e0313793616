"""Reading of safetensors files: headers at once, values by slices, straight into given arrays."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from pgjax.models.pretrained.layout import Layout, Sizes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CHUNK = 2**17  # bytes read at once; a transposing copy of so few stays in the cache
_LFS = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER = 100 * 2**20  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies; `dtype` is None where its values are not floating."""

    name: str
    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype | None:
        return DTYPES.get(self.dtype_name)

    def floating(self) -> np.dtype:
        """The dtype; ValueError where it is not one that parameters have."""
        if self.dtype is None:
            raise ValueError(
                f"{self.file}: {self.name} has dtype {self.dtype_name}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        return self.dtype


class Tensors(Mapping[str, Tensor]):
    """Tensors of any files by name; the files are opened when they are read."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._files: dict[Path, int] = {}
        self._scratch = np.empty(0, np.uint8)
        self._tensors: dict[str, Tensor] = {}
        for tensor in tensors:
            if tensor.name in self._tensors:
                other = self._tensors[tensor.name].file.name
                raise ValueError(f"{tensor.file}: {tensor.name} is also in {other}")
            self._tensors[tensor.name] = tensor

    @classmethod
    def of_directory(cls, directory: Path) -> Tensors:
        """Those of a checkpoint: of one file, or of several and their index."""
        files, indexed = _weight_files(directory)
        tensors = cls(tensor for file in files for tensor in read_header(file))
        for name, file_name in indexed.items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise ValueError(
                    f"{directory / INDEX}: lists {name} in {file_name}, which does not have it"
                )
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(
        self,
        out: np.ndarray,
        tensor: Tensor,
        layout: Layout,
        sizes: Sizes,
        index: Sequence[slice],
    ) -> None:
        """Fills `out` with a slice of the parameter that `layout` finds in the tensor.

        The file is read in pieces of about 128 KiB, each copied at once to where it belongs, so
        that neither the tensor nor the file's pages are held.
        """
        dtype, shape = tensor.floating(), layout.atomic_shape(sizes)
        ranges = layout.ranges(index, sizes)
        # The axes before `along` are at one index each: beneath them the file is contiguous.
        along = next((i for i, r in enumerate(ranges) if r.stop - r.start != 1), len(ranges) - 1)
        strides = [math.prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape))]
        start = tensor.offset + sum(
            r.start * s for r, s in zip(ranges[:along], strides, strict=False)
        )
        first, last, stride = ranges[along].start, ranges[along].stop, strides[along]
        target, plain = _comparable(out, dtype)
        where = layout.names.index(name) if (name := layout.axes[along].name) else None
        step = max(1, _CHUNK // stride)
        for row in range(first, last, step):
            rows = min(step, last - row)
            block = self._read_bytes(tensor, start + row * stride, rows * stride).view(plain)
            block = block.reshape((1,) * along + (rows, *shape[along + 1 :]))
            inner = (slice(None),) * (along + 1) + tuple(ranges[along + 1 :])
            piece = layout.arranged(block[inner])
            if where is None:
                target[...] = piece
            else:
                at = slice(row - first, row - first + rows)
                target[(slice(None),) * where + (at,)] = piece

    def equal(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors hold the same bytes; they are read side by side, in pieces."""
        if (a.dtype_name, a.shape) != (b.dtype_name, b.shape):
            return False
        size = math.prod(a.shape) * a.floating().itemsize
        for start in range(0, size, _CHUNK):
            count = min(_CHUNK, size - start)
            first = self._read_bytes(a, a.offset + start, count).copy()
            if not np.array_equal(first, self._read_bytes(b, b.offset + start, count)):
                return False
        return True

    def _read_bytes(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        """A view of memory that the next call overwrites."""
        if tensor.file not in self._files:
            self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        if self._scratch.size < count:
            self._scratch = np.empty(count, np.uint8)
        out, done = self._scratch[:count], 0
        while done < count:
            got = os.preadv(self._files[tensor.file], [out[done:].data], start + done)
            if not got:
                raise ValueError(f"{tensor.file}: ends within {tensor.name}; is it truncated?")
            done += got
        return out


def _comparable(out: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.dtype]:
    """The target and the dtype to read as: plain bits where nothing has to be converted."""
    if out.dtype != dtype:
        return out, dtype
    bits = np.dtype(f"u{dtype.itemsize}")
    return out.view(bits), bits


def read_header(file: Path) -> list[Tensor]:
    """The tensors of one safetensors file; ValueError where it is not a whole, valid one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(max(8, len(_LFS)))
        if start.startswith(_LFS):
            raise ValueError(
                f"{file}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
            )
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or (length <= _MAX_HEADER and 8 + length > size):
            raise ValueError(f"{file}: has {size} bytes and ends within its header; truncated?")
        if length > _MAX_HEADER:
            raise ValueError(f"{file}: does not begin like a safetensors file")
        stream.seek(8)
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors, ends = [], [0]
        for name, entry in header.items():
            begin, end = (int(x) for x in entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
            tensors.append(Tensor(name, file, str(entry["dtype"]), shape, 8 + length + begin))
            if not 0 <= begin <= end or any(n < 0 for n in shape):
                raise ValueError(f"{name} has offsets {begin} to {end} and shape {shape}")
            dtype = tensors[-1].dtype
            if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
                raise ValueError(f"{name} of shape {shape} has {end - begin} bytes")
            ends.append(end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: is not a valid safetensors file ({error})") from error
    if 8 + length + max(ends) != size:
        raise ValueError(
            f"{file}: has {size} bytes, but its header describes {8 + length + max(ends)}; "
            "is it truncated?"
        )
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The header's free text entries; `read_header` checks the file."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return dict(header.get("__metadata__", {}))


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the weights, and what the index says of them."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], {}
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ValueError(f"{index}: expected a weight_map from tensors to files")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: listed in {INDEX}, but missing; is the download complete?"
                )
        return files, weight_map
    pickled = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
    if pickled:
        raise ValueError(
            f"{directory}: has its weights in {pickled[0]} alone, a pickle, which can run any "
            "code when it is read; convert it to safetensors"
        )
    raise FileNotFoundError(f"{directory}: has neither {SINGLE} nor {INDEX}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError where it is something else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also of an invalid encoding
        raise ValueError(f"{file}: is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data
