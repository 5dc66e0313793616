"""Records of a run, one JSON line each, that outlive crashes; TensorBoard files beside them."""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
_RESERVED = ("step", "phase")


def repeats(name: str) -> bool:
    """Whether a run that is repeated, or resumed, records the same number under this name.

    Times, what was compiled, and device memory are as they happen to be.
    """
    return not name.startswith(("seconds", "device_memory")) and name not in (
        "compilations",
        "tokens/s",
    )


def _number(name: str, value: Any) -> float | int:
    """A Python number; ValueError for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype.kind in "biu":
            return int(array)
        if array.ndim == 0:
            return float(array)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name}: expected a number, got {value!r}")


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parse(lines: Sequence[bytes], path: Any) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
        rows.append(row)
    return rows


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, oldest first.

    Args:
      path: the file, or the directory a `MetricsWriter` wrote to.

    Returns:
      one dict per record: `step`, `phase` and numbers, NaN where a value was not finite. A last
      line that a dying process left incomplete is left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: any other line that is not a JSON object, naming the line.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    *lines, tail = path.read_bytes().split(b"\n")
    if _is_record(tail):
        lines.append(tail)
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row in _parse(lines, path)
    ]


def _belongs(phase: Any, phases: Sequence[str]) -> int | None:
    """The index of the phase that `phase` is, or is a part of, as `sft_evaluation` is of `sft`."""
    found = [
        i for i, name in enumerate(phases) if phase == name or str(phase).startswith(f"{name}_")
    ]
    return max(found, key=lambda i: len(phases[i]), default=None)


class MetricsWriter:
    """Appends records to `metrics.jsonl`, and to TensorBoard files under `tensorboard/<phase>`.

    A line is one write to a file opened for appending, so a process that dies leaves whole lines,
    and at worst a torn last one, which the next writer removes. TensorBoard's files follow within
    seconds; what they lack after a crash, `metrics.jsonl` has. In a job of several processes one
    of them writes.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
    ) -> None:
        """Opens a directory, which is made where it does not exist, and goes on after its records.

        Args:
          directory: where to write.
          tensorboard: whether to write TensorBoard files too. Without the tensorboardX package
            there are none, which is logged once.
          wandb: project of Weights & Biases to write to as well; None: do not.

        Raises:
          ImportError: a project is given, and the wandb package is not installed.
          NotADirectoryError: the path, or a part of it, is a file.
          OSError: the directory cannot be made or written to.
        """
        self._directory = pathlib.Path(directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(
                f"directory: {self._directory} cannot hold metrics: "
                "it, or a part of its path, is a file"
            ) from error
        self.path = self._directory / FILE_NAME
        self._file: int | None = None
        self._open()
        self._not_finite: set[str] = set()
        self._tensorboard = tensorboard
        self._purge: dict[str, int] = {}
        self._event_writers: dict[str, Any] = {}
        self._wandb = None
        if wandb is not None:
            from pgjax.train.metrics.weights_and_biases import WandbRun

            self._wandb = WandbRun(wandb, self._directory)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        tail = self.path.read_bytes().split(b"\n")[-1]
        if _is_record(tail):
            os.write(self._file, b"\n")
        elif tail:
            os.ftruncate(self._file, os.path.getsize(self.path) - len(tail))

    def write(self, step: int, values: Mapping[str, Any], *, phase: str = "train") -> None:
        """Appends one record.

        Args:
          step: of the phase, at least 0.
          values: numbers by name: Python, NumPy or JAX scalars. Values that are not finite are
            written as null (JSON has no NaN), and the first of each name is logged.
          phase: part of the run.

        Raises:
          ValueError: a value that is not a number, or named `step` or `phase`; a closed writer.
        """
        if self._file is None:
            raise ValueError(f"metrics in {self._directory} are closed")
        for name in _RESERVED:
            if name in values:
                raise ValueError(f"values: {name!r} is a field of every record, use another name")
        numbers = {name: _number(f"values[{name!r}]", value) for name, value in values.items()}
        row: dict[str, Any] = {"step": int(step), "phase": phase}
        for name, number in numbers.items():
            finite = math.isfinite(number)
            row[name] = number if finite else None
            if not finite and name not in self._not_finite:
                self._not_finite.add(name)
                logger.warning(
                    "%s is %s at step %d of %s; written as null, here and from now on",
                    name,
                    number,
                    step,
                    phase,
                )
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path}: a record was written in part; is the disk full?")
        writer = self._events(phase)
        if writer is not None:
            for name, number in numbers.items():
                if math.isfinite(number):
                    writer.add_scalar(name, number, step)
        if self._wandb is not None:
            finite_ones = {name: x for name, x in numbers.items() if math.isfinite(x)}
            self._wandb.write(step, finite_ones, phase=phase)

    def _events(self, phase: str) -> Any:
        if not self._tensorboard:
            return None
        if phase not in self._event_writers:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                self._tensorboard = False
                logger.warning(
                    "tensorboardX is not installed: metrics go to %s only "
                    "(pip install tensorboardX, or pgjax[experiments])",
                    self.path,
                )
                return None
            directory = self._directory / "tensorboard" / phase
            # Files are named by the second, read in order of name, and overwritten when equal.
            number = len(list(directory.glob("events.*"))) if directory.is_dir() else 0
            self._event_writers[phase] = SummaryWriter(
                str(directory),
                purge_step=self._purge.pop(phase, None),
                filename_suffix=f".{number:04d}",
                flush_secs=5,
            )
        return self._event_writers[phase]

    def truncate_after(
        self, step: int, *, phase: str = "train", phases: Sequence[str] | None = None
    ) -> int:
        """Drops what a run resumed at `step` of `phase` is about to record again.

        Kept are earlier phases, and of this phase the steps up to `step`. A phase whose name goes
        on after an underscore, as `sft_evaluation` does after `sft`, is a part of it. The file is
        replaced in one move; TensorBoard hides the points dropped.

        Args:
          step: of the checkpoint the run resumes from; records at `step` itself are kept.
          phase: the phase resumed.
          phases: all phases in order; default: in the order the file first mentions them.

        Returns:
          how many records were dropped.

        Raises:
          ValueError: `phase` is not among `phases`, or the file has one that is not.
        """
        if self._file is None:
            raise ValueError(f"metrics in {self._directory} are closed")
        lines = [line for line in self.path.read_bytes().split(b"\n")[:-1] if line.strip()]
        rows = _parse(lines, self.path)
        seen = list(dict.fromkeys(str(row.get("phase")) for row in rows))
        if phases is None:
            names = list(dict.fromkeys([*seen, phase]))
            phases = [p for p in names if _belongs(p, [q for q in names if q != p]) is None]
        position = _belongs(phase, phases)
        if position is None:
            raise ValueError(f"phase: {phase!r} is not one of {', '.join(phases)}")
        order: dict[str, int] = {}
        for name in seen:
            index = _belongs(name, phases)
            if index is None:
                raise ValueError(f"phases: the file has {name!r}, not one of {', '.join(phases)}")
            order[name] = index
        kept = []
        for line, row in zip(lines, rows, strict=True):
            index = order[str(row.get("phase"))]
            if index < position or (index == position and row["step"] <= step):
                kept.append(line)
        for name, index in order.items():
            if index >= position:
                self._purge[name] = step + 1 if index == position else 0
        self._close_events()
        # Made beside the file and moved over it: a process that dies leaves the one or the other.
        new = self.path.with_suffix(".new")
        new.write_bytes(b"".join(line + b"\n" for line in kept))
        os.close(self._file)
        self._file = None
        os.replace(new, self.path)
        self._open()
        if self._tensorboard and (self._directory / "tensorboard").is_dir():
            for name in list(self._purge):
                if (self._directory / "tensorboard" / name).is_dir():
                    self._events(name)  # tells TensorBoard now, even if nothing more is written
        return len(rows) - len(kept)

    def _close_events(self) -> None:
        for writer in self._event_writers.values():
            writer.close()
        self._event_writers.clear()

    def close(self) -> None:
        """Closes the files. Closing twice is allowed."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._close_events()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None
