"""Opening a directory of checkpoints."""

from __future__ import annotations

import os
import warnings

import jax
from etils import epath

from pgjax.train.checkpoints.errors import CheckpointWarning
from pgjax.train.checkpoints.files import TEMPORARY
from pgjax.train.checkpoints.handle import Checkpoints
from pgjax.train.checkpoints.manager import synchronize


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
        for leftover in sorted(path.glob(f"*{TEMPORARY}*")):
            leftover.rmtree()
            warnings.warn(
                f"deleted {leftover}: an unfinished checkpoint of a process that died",
                CheckpointWarning,
                stacklevel=2,
            )
    synchronize("pgjax: checkpoint directory ready")
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
    probe = path / ".writable"  # one name, so that a process that dies here leaves no more than it
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"directory: {path} cannot hold checkpoints: it, or a part of its path, is a file"
        ) from error
    except OSError as error:
        raise type(error)(
            error.errno, f"directory: {path} cannot hold checkpoints: {error.strerror}"
        ) from error


def _as_path(directory: str | os.PathLike[str]) -> epath.Path:
    text = os.fspath(directory)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))
