"""Saving and restoring: the handle on a directory of checkpoints."""

from __future__ import annotations

import math
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pgjax.train.checkpoints import files, leaves, manager
from pgjax.train.checkpoints.errors import CheckpointError, CheckpointWarning, Damaged
from pgjax.train.checkpoints.retention import Retention, best_first

_Tree = TypeVar("_Tree")


# A Python whose main thread is at its end starts no thread in these versions (python/cpython
# #113964), so a save under way could neither end nor give up.
_NO_THREADS_AT_EXIT = (3, 12, 0) <= sys.version_info < (3, 12, 3)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:300]}"


def _close_before_exit(handle: Checkpoints) -> None:
    """Lets a process that never calls `close` end, and its last save finish where it can.

    The writing threads need executors, which refuse work once the interpreter shuts down, and
    then wait for each other for ever. `atexit` comes after that; this hook, which the executors
    themselves use, comes before, since the last one registered is called first. A save that fails
    then is said to be missing, and the checkpoints before it are whole.
    """
    reference = weakref.ref(handle)

    def close() -> None:
        if (alive := reference()) is not None:
            try:
                alive.close()
            except Exception as error:  # whatever it is: no one is left to raise it to
                print(
                    f"{alive.directory}: the process ended before its checkpoints were closed; "
                    f"the last save is missing ({_first_line(error)})",
                    file=sys.stderr,
                )

    register = getattr(threading, "_register_atexit", None)  # not public; there since Python 3.9
    if register is not None:
        register(close)


class Checkpoints:
    """Checkpoints in one directory; made by `open` or `open_readonly`. A context manager.

    One process (or one job of several) writes to a directory; any number may read it.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        best_metric: str | None = None,
        lowest_is_best: bool = False,
        writable: bool,
    ) -> None:
        self._directory = directory
        self._writable = writable
        self._best_metric, self._sign = best_metric, -1.0 if lowest_is_best else 1.0
        self._scores: dict[int, float] = {}
        self._unreadable: dict[int, str] = {}
        self._saving: int | None = None
        self._closed = False
        retention = Retention(keep_last, keep_best, lambda: self._scores)
        self._manager = (
            manager.writing(directory, retention, self._before_commit)
            if writable
            else manager.reading(directory)
        )
        self._read_scores()
        if writable:
            _close_before_exit(self)

    @property
    def directory(self) -> str:
        """Where the checkpoints are."""
        return str(self._directory)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts writing a checkpoint; returns as soon as the state has been copied.

        The caller may donate or change the state at once. Only one checkpoint is written at a
        time: a save waits for the one before it. It counts from the moment it is complete; a
        process that dies earlier leaves the previous ones as they were. Afterwards those that are
        neither among the last nor the best are deleted. Under Python 3.12.0 to 3.12.2, which start
        no thread at their exit, it returns when all is written.

        Args:
          step: larger than every step saved so far.
          state: pytree of JAX arrays (sharded ones and PRNG keys of both kinds included), NumPy
            arrays and Python numbers.
          metadata: JSON data, returned by `restore`; tuples come back as lists.
          metrics: numbers by name. Without a finite value for `best_metric` the checkpoint is
            never the best. Pass them only where they were measured on this very state.

        Raises:
          ValueError: a step that is not larger, a leaf or metadata that cannot be saved.
          CheckpointError: the save before this one failed, or this one where it was waited for.
        """
        self._check_open(writing=True)
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
            raise ValueError(f"step: expected an integer of at least 0, got {step!r}")
        step = int(step)
        self._set_unreadable_aside()
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"step: {step} is not after the newest checkpoint, {newest}, in {self.directory}; "
                "restore that one, drop it with delete_after, or use another directory"
            )
        arrays, described = leaves.stored(state)
        info = files.make_info(step, metadata, metrics, described)
        self.wait()
        self._score(step, info["metrics"])
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), info=ocp.args.JsonSave(info)
            ),
            force=True,
        )
        if _NO_THREADS_AT_EXIT:
            self.wait()

    def steps(self) -> list[int]:
        """Steps that are complete or being written, in order; those found damaged are left out."""
        self._check_open()
        if not self._writable:
            self._reload()
            self._read_scores()
        return sorted(s for s in self._manager.all_steps() if s not in self._unreadable)

    def latest_step(self) -> int | None:
        """The newest of `steps()`, None when there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best finite value of `best_metric`, None when there is none.

        Of equal values the earliest counts.
        """
        if self._best_metric is None:
            raise ValueError("best_step: these checkpoints were opened without a best_metric")
        return next(iter(best_first(self.steps(), self._scores)), None)

    def restore(self, step: int | None = None, *, like: _Tree) -> tuple[_Tree, dict[str, Any]]:
        """Reads a checkpoint back, bit for bit.

        Args:
          step: one of `steps()`; None for the newest that is undamaged: each damaged one is passed
            over with a `CheckpointWarning` that says what is wrong with it. The next `save` moves
            what was passed over out of the way, to `unreadable-<step>`.
          like: pytree of the saved structure, shapes and dtypes, of arrays or
            `jax.ShapeDtypeStruct`s. Each leaf comes back in the form of its counterpart: a JAX
            array with its sharding (which may be of another mesh than the saved one's) or, where
            that is not committed to devices or is not given, on the default device; a NumPy array;
            a number; a typed PRNG key.

        Returns:
          the state and the metadata given to `save`.

        Raises:
          ValueError: `like` has another structure, shape or dtype, naming the leaf.
          FileNotFoundError: no checkpoint at all, or none of that step.
          CheckpointError: none can be read, or not that of the given step.
        """
        self._check_open()
        self.wait()
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise FileNotFoundError(
                    f"step: no checkpoint of step {step} in {self.directory}, "
                    f"there are {steps or 'none'}"
                )
            try:
                return self._load(step, like)
            except Damaged as damage:
                raise CheckpointError(
                    f"checkpoint {step} in {self.directory} is damaged: {damage}"
                ) from damage
        if not steps and not self._unreadable:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        for candidate in reversed(steps):
            try:
                result = self._load(candidate, like)
            except Damaged as damage:
                if not self._exists(candidate):
                    continue  # deleted by its writer since it was listed
                self._unreadable[candidate] = str(damage)
                self._scores.pop(candidate, None)
                warnings.warn(
                    f"checkpoint {candidate} in {self.directory} is damaged and was passed over: "
                    f"{damage}",
                    CheckpointWarning,
                    stacklevel=2,
                )
            else:
                return result
        reasons = "; ".join(f"step {s}: {why}" for s, why in sorted(self._unreadable.items()))
        raise CheckpointError(f"no checkpoint in {self.directory} can be read: {reasons}")

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, to go on from an earlier one."""
        self._check_open(writing=True)
        self.wait()
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)
            self._unreadable.pop(later, None)
            self._scores.pop(later, None)

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
          CheckpointError: the save failed; earlier checkpoints are as they were.
        """
        self._check_open()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            failed, self._saving = self._saving, None
            self._scores.pop(-1 if failed is None else failed, None)
            self._reload()  # what was due for deletion is still there
            raise CheckpointError(
                f"saving step {failed} in {self.directory} failed: {_first_line(error)}"
            ) from error
        self._saving = None

    def close(self) -> None:
        """Waits for the save under way and frees the threads. Closing twice is allowed."""
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._closed = True
            self._manager.close()

    def _check_open(self, *, writing: bool = False) -> None:
        if self._closed:
            raise ValueError(f"checkpoints in {self.directory} are closed")
        if writing and not self._writable:
            raise ValueError(f"checkpoints in {self.directory} were opened for reading")

    def _reload(self) -> None:
        with manager.quiet():
            self._manager.reload()

    def _exists(self, step: int) -> bool:
        return (self._directory / str(step)).exists()

    def _score(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._best_metric) if self._best_metric is not None else None
        if isinstance(value, int | float) and math.isfinite(value):
            self._scores[step] = self._sign * value

    def _read_scores(self) -> None:
        if self._best_metric is None:
            return
        for step in self._manager.all_steps():
            if step not in self._scores and step not in self._unreadable:
                try:
                    self._score(step, files.read_info(self._directory / str(step)).metrics)
                except Damaged:
                    continue  # said when it is restored; without a score it is not kept as the best

    def _before_commit(self) -> None:
        """Runs in Orbax's thread when all files are written, before the rename."""
        if "://" in str(self._directory):
            return  # an object store has no rename to come before
        for path in self._directory.glob(f"{self._saving}{files.TEMPORARY}*"):
            files.list_files(path)

    def _load(self, step: int, like: _Tree) -> tuple[_Tree, dict[str, Any]]:
        directory = self._directory / str(step)
        verified = files.verify(directory)
        info = files.read_info(directory)

        def read(targets: Any) -> Any:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
            try:
                with manager.quiet():
                    return self._manager.restore(step, args=args).state
            except Exception as error:
                if verified or isinstance(error, MemoryError):
                    raise  # the files are what was written: the cause is elsewhere
                raise Damaged(_first_line(error)) from error

        return leaves.restored(like, info.leaves, step, read), info.metadata

    def _set_unreadable_aside(self) -> None:
        """Moves damaged checkpoints out of the way of new ones, without deleting them."""
        if not self._unreadable:
            return
        for step in self._unreadable:
            if jax.process_index() == 0 and self._exists(step):
                target = self._directory / f"unreadable-{step}"
                if target.exists():
                    target.rmtree()
                (self._directory / str(step)).rename(target)
        manager.synchronize("pgjax: unreadable checkpoints set aside")
        self._unreadable.clear()
        self._reload()
