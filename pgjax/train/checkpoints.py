"""Checkpoints of a run: asynchronous, atomic, verified; the last ones and the best.

A directory holds one sub-directory per saved step, written by Orbax: `<step>/state` (arrays,
readable with Orbax alone) and `<step>/info` (JSON). A list of its files with their sizes and
checksums is part of each, so that damage is recognised before anything is read into a run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pgjax.parallel.sharding import shard

_Tree = TypeVar("_Tree")

_FORMAT = 1
_INFO_FILE = "info.json"
_FILES_FILE = "files.json"
_TEMPORARY = ".orbax-checkpoint-tmp"
_CHECKSUM_LIMIT = 4 * 2**30  # bytes; of larger checkpoints only the sizes are compared


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those present can be read."""


class CheckpointWarning(UserWarning):
    """A checkpoint was ignored; the message says which and why."""


class _Damaged(Exception):
    """Why one checkpoint cannot be used."""


# --- names, shapes and dtypes of leaves ----------------------------------------------------------


class _Leaf(NamedTuple):
    """How a leaf is stored; `data_shape` and `implementation` differ from None for typed keys."""

    where: str
    dtype: str
    shape: tuple[int, ...]
    data_shape: tuple[int, ...] | None
    implementation: str | None

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(entry: Any) -> str:
    """One step of a path as a name without the separators of Orbax's storage."""
    found = [getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a)]
    text = str(found[0] if found else entry)
    return re.sub(r"[%./]", lambda m: f"%{ord(m.group()):02x}", text) or "%"


def _named_leaves(tree: Any, argument: str) -> dict[tuple[str, ...], tuple[str, Any]]:
    """Each leaf with its readable path, by its name in storage."""
    named: dict[tuple[str, ...], tuple[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = tuple(_name(entry) for entry in path) or ("leaf",)
        where = jax.tree_util.keystr(path) or "the only leaf"
        if name in named:
            raise ValueError(f"{argument}: {named[name][0]} and {where} have the same name")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(
            leaf, bool | int | float | complex
        ):
            raise ValueError(
                f"{argument}: {where} is a {type(leaf).__name__}, expected an array or a number"
            )
        named[name] = (where, leaf)
    if not named:
        raise ValueError(f"{argument}: expected at least one array, got none")
    return named


def _describe(where: str, leaf: Any) -> _Leaf:
    if not _is_key(leaf):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        return _Leaf(where, str(np.dtype(dtype)), tuple(np.shape(leaf)), None, None)
    data = jax.eval_shape(jax.random.key_data, leaf)
    implementation = None if _is_abstract(leaf) else str(jax.random.key_impl(leaf))
    return _Leaf(where, str(leaf.dtype), tuple(leaf.shape), tuple(data.shape), implementation)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in flat.items():
        inner = result
        for part in name[:-1]:
            inner = inner.setdefault(part, {})
        inner[name[-1]] = value
    return result


def _stored(where: str, leaf: Any) -> Any:
    """What Orbax is given: a JAX array, or a copy of host data that later changes cannot reach."""
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"state: {where} is traced; save outside of jit")
    if isinstance(leaf, jax.Array):
        if leaf.is_deleted():
            raise ValueError(f"state: {where} was donated or deleted and cannot be saved")
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf
    array = np.array(leaf)
    if array.dtype.hasobject or array.dtype.kind in "USMm":
        raise ValueError(f"state: {where} has dtype {array.dtype}, which cannot be saved")
    return array


def _committed(leaf: Any) -> bool:
    """Whether a restored leaf must stay on `leaf`'s devices, rather than go wherever it is used."""
    if _is_abstract(leaf):
        return leaf.sharding is not None
    return bool(getattr(leaf, "committed", getattr(leaf, "_committed", True)))


def _target(like: Any, saved: _Leaf) -> Any:
    """What Orbax restores into."""
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct) and not _is_key(like):
        if _committed(like):
            return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
        return np.empty(like.shape, like.dtype)
    if _is_key(like):
        assert saved.data_shape is not None
        return np.empty(saved.data_shape, np.uint32)
    return np.empty(np.shape(like), np.asarray(like).dtype)


def _as_like(restored: Any, like: Any, saved: _Leaf) -> Any:
    """The restored value in the form and place of `like`."""
    if _is_key(like):
        key = jax.random.wrap_key_data(jax.numpy.array(restored), impl=saved.implementation)
        return shard(key, like.sharding) if _committed(like) else key
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        # `array` copies: a buffer shared with NumPy could not be donated.
        if not _committed(like):
            return jax.numpy.array(restored, dtype=like.dtype)
        return shard(restored, like.sharding)  # it is there already, unless it is empty
    if isinstance(like, np.ndarray):
        return np.asarray(restored)
    if isinstance(like, np.generic):
        return like.dtype.type(np.asarray(restored)[()])
    return type(like)(np.asarray(restored).item())


# --- JSON and files ------------------------------------------------------------------------------


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


def _is_local(directory: epath.Path) -> bool:
    return "://" not in str(directory)


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


def _list_files(directory: epath.Path) -> None:
    """Writes the list of a checkpoint's files into it, before the rename that makes it count."""
    sizes = {name: (directory / name).stat().length for name in _files(directory)}
    checked = sum(sizes.values()) <= _CHECKSUM_LIMIT
    listing = {
        name: [size, _checksum(directory / name) if checked else None]
        for name, size in sizes.items()
    }
    (directory / _FILES_FILE).write_text(json.dumps(listing))


def _verify(directory: epath.Path) -> bool:
    """Whether there is a list of files; raises `_Damaged` when they are not as listed."""
    path = directory / _FILES_FILE
    if not path.exists():
        return False
    try:
        listing = json.loads(path.read_text())
        for name, (size, crc) in listing.items():
            file = directory / name
            if not file.exists():
                raise _Damaged(f"file {name} is missing")
            if file.stat().length != size:
                raise _Damaged(f"file {name} has {file.stat().length} bytes, expected {size}")
            if crc is not None and _checksum(file) != crc:
                raise _Damaged(f"file {name} does not match its checksum")
    except (ValueError, TypeError, AttributeError) as error:
        raise _Damaged(f"file {_FILES_FILE} is unreadable ({error})") from error
    return True


def _read_info(directory: epath.Path) -> dict[str, Any]:
    path = directory / "info" / _INFO_FILE
    try:
        info = json.loads(path.read_text())
        if info["format"] > _FORMAT:
            raise CheckpointError(
                f"{directory}: written in format {info['format']}, this version reads {_FORMAT}"
            )
        return {
            "metadata": dict(info["metadata"]),
            "metrics": dict(info["metrics"]),
            "leaves": {
                tuple(name): _Leaf(
                    where, dtype, tuple(shape), None if data is None else tuple(data), impl
                )
                for name, (where, dtype, shape, data, impl) in info["leaves"]
            },
        }
    except OSError as error:
        raise _Damaged(f"file info/{_INFO_FILE} cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"file info/{_INFO_FILE} is not valid ({error})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops Orbax's own warnings while this module looks at a directory and reports by itself."""
    orbax = f"{os.sep}orbax{os.sep}"

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING or orbax not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:300]}"


def _match(like: Any, info: Mapping[str, Any], step: int) -> dict[tuple[str, ...], tuple[str, Any]]:
    """`like`'s named leaves, or ValueError naming a leaf that is not as saved."""
    wanted = _named_leaves(like, "like")
    saved: dict[tuple[str, ...], _Leaf] = info["leaves"]
    problems = [
        f"{where} is not in the checkpoint"
        for name, (where, _) in wanted.items()
        if name not in saved
    ]
    problems += [
        f"the checkpoint's {leaf.where} ({leaf}) is not in like"
        for name, leaf in saved.items()
        if name not in wanted
    ]
    for name, (where, leaf) in wanted.items():
        if name not in saved:
            continue
        here, there = _describe(where, leaf), saved[name]
        differs = here.implementation and here.implementation != there.implementation
        if here[1:4] != there[1:4] or differs:
            problems.append(f"{where} is {there} in the checkpoint, but {here} in like")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"like: does not match step {step}: {'; '.join(problems[:5])}{more}")
    return wanted


# --- the handle ----------------------------------------------------------------------------------


class _Retention:
    """Orbax's question of what to keep: the last ones, and those with the best scores."""

    def __init__(self, last: int, best: int, scores: Callable[[], Mapping[int, float]]) -> None:
        self._last, self._best, self._scores = last, best, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = set(sorted(steps)[-self._last :])
        keep |= set(_best_first(steps, self._scores())[: self._best])
        return [step in keep for step in steps]


def _best_first(steps: Sequence[int], scores: Mapping[int, float]) -> list[int]:
    """Steps that have a score, best first; of equals the earliest, which is the one measured."""
    return sorted((s for s in steps if s in scores), key=lambda s: (-scores[s], s))


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
        options: dict[str, Any] = {"create": False, "enable_async_checkpointing": True}
        if writable:
            options["preservation_policy"] = _Retention(keep_last, keep_best, lambda: self._scores)
            options["async_options"] = ocp.AsyncOptions(
                post_finalization_callback=self._before_commit
            )
        with _quiet():
            self._manager = ocp.CheckpointManager(
                directory,
                options=ocp.CheckpointManagerOptions(**options),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "info": ocp.JsonCheckpointHandler(filename=_INFO_FILE),
                },
            )
        self._read_scores()

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
        neither among the last nor the best are deleted.

        Args:
          step: larger than every step saved so far.
          state: pytree of JAX arrays (sharded ones and PRNG keys of both kinds included), NumPy
            arrays and Python numbers.
          metadata: JSON data, returned by `restore`; tuples come back as lists.
          metrics: numbers by name. Without a finite value for `best_metric` the checkpoint is
            never the best. Pass them only where they were measured on this very state.

        Raises:
          ValueError: a step that is not larger, a leaf or metadata that cannot be saved.
          CheckpointError: the save before this one failed.
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
        named = _named_leaves(state, "state")
        stored = {name: _stored(where, leaf) for name, (where, leaf) in named.items()}
        # Orbax refuses arrays without elements; `info` has their shapes.
        stored = {name: value for name, value in stored.items() if value.size}
        if not stored:
            raise ValueError("state: expected at least one array with elements, got none")
        numbers = _numbers(metrics)
        info = {
            "format": _FORMAT,
            "step": step,
            "metadata": _plain(metadata or {}, "metadata"),
            "metrics": numbers,
            "leaves": [[name, _describe(where, leaf)] for name, (where, leaf) in named.items()],
        }
        self.wait()
        self._score(step, numbers)
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_nested(stored)), info=ocp.args.JsonSave(info)
            ),
            force=True,
        )

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
        return next(iter(_best_first(self.steps(), self._scores)), None)

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
            except _Damaged as damage:
                raise CheckpointError(
                    f"checkpoint {step} in {self.directory} is damaged: {damage}"
                ) from damage
        if not steps and not self._unreadable:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        for candidate in reversed(steps):
            try:
                result = self._load(candidate, like)
            except _Damaged as damage:
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
        with _quiet():
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
                    self._score(step, _read_info(self._directory / str(step))["metrics"])
                except _Damaged:
                    continue  # said when it is restored; without a score it is not kept as the best

    def _before_commit(self) -> None:
        """Runs in Orbax's thread when all files are written, before the rename."""
        if not _is_local(self._directory):
            return
        for path in self._directory.glob(f"{self._saving}{_TEMPORARY}*"):
            _list_files(path)

    def _load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        directory = self._directory / str(step)
        verified = _verify(directory)
        info = _read_info(directory)
        wanted = _match(like, info, step)
        leaves = info["leaves"]
        targets = {name: _target(leaf, leaves[name]) for name, (_, leaf) in wanted.items()}
        empty = {n: np.zeros(t.shape, t.dtype) for n, t in targets.items() if 0 in t.shape}
        targets = {n: t for n, t in targets.items() if n not in empty}
        try:
            with _quiet():
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(_nested(targets))),
                ).state
        except Exception as error:
            if verified or isinstance(error, MemoryError):
                raise  # the files are what was written: the cause is elsewhere
            raise _Damaged(_first_line(error)) from error

        def find(name: tuple[str, ...]) -> Any:
            if name in empty:
                return empty[name]
            inner = restored
            for part in name:
                inner = inner[part]
            return inner

        values = [_as_like(find(n), leaf, leaves[n]) for n, (_, leaf) in wanted.items()]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), values), info[
            "metadata"
        ]

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
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("pgjax: unreadable checkpoints set aside")
        self._unreadable.clear()
        self._reload()


def _as_path(directory: str | os.PathLike[str]) -> epath.Path:
    text = os.fspath(directory)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def open(
    directory: str | os.PathLike[str],
    *,
    keep_last: int = 2,
    keep_best: int = 1,
    best_metric: str | None = None,
    lowest_is_best: bool = False,
) -> Checkpoints:
    """Opens a directory for saving and restoring, and clears away unfinished saves.

    Args:
      directory: made where it does not exist.
      keep_last: how many of the newest checkpoints to keep, at least 1; 2 leave one to fall back
        on when the newest is damaged.
      keep_best: how many of the best to keep beside them, at least 0.
      best_metric: name of the metric given to `save` that tells the best; None for none.
      lowest_is_best: whether a lower value of `best_metric` is better.

    Raises:
      ValueError: counts out of range.
      NotADirectoryError: the path, or a part of it, is a file.
      PermissionError, OSError: the directory cannot be made or written to.

    Warns:
      CheckpointWarning: an unfinished save of a process that died was found and deleted.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: expected at least 1, got {keep_last}")
    if keep_best < 0:
        raise ValueError(f"keep_best: expected at least 0, got {keep_best}")
    path = _as_path(directory)
    if jax.process_index() == 0:
        _make_writable(path)
        for leftover in sorted(path.glob(f"*{_TEMPORARY}*")):
            leftover.rmtree()
            warnings.warn(
                f"deleted {leftover}: an unfinished checkpoint of a process that died",
                CheckpointWarning,
                stacklevel=2,
            )
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("pgjax: checkpoint directory ready")
    return Checkpoints(
        path,
        keep_last=keep_last,
        keep_best=keep_best,
        best_metric=best_metric,
        lowest_is_best=lowest_is_best,
        writable=True,
    )


def open_readonly(
    directory: str | os.PathLike[str],
    *,
    best_metric: str | None = None,
    lowest_is_best: bool = False,
) -> Checkpoints:
    """Opens a directory for restoring only; safe while another process writes to it.

    Args:
      directory: must exist.
      best_metric: as in `open`.
      lowest_is_best: as in `open`.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no such directory.
    """
    path = _as_path(directory)
    if not path.exists():
        raise FileNotFoundError(f"directory: {path} does not exist")
    if not path.is_dir():
        raise NotADirectoryError(f"directory: {path} is not a directory")
    return Checkpoints(path, best_metric=best_metric, lowest_is_best=lowest_is_best, writable=False)


def _make_writable(path: epath.Path) -> None:
    """Makes the directory and proves that it can be written to."""
    probe = path / f".writable-{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"directory: {path} cannot hold checkpoints: it, or a part of its path, is a file"
        ) from error
    except OSError as error:
        raise type(error)(
            error.errno, f"directory: {path} cannot hold checkpoints: {error.strerror}"
        ) from error
