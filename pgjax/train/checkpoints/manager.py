"""Orbax's manager of a directory, set up for writing or for reading."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from pgjax.train.checkpoints.files import INFO_FILE
from pgjax.train.checkpoints.retention import Retention


def writing(
    directory: epath.Path, retention: Retention, before_commit: Callable[[], None]
) -> ocp.CheckpointManager:
    """`before_commit` runs when all files of a checkpoint are written, before the rename."""
    return _manager(
        directory,
        preservation_policy=retention,
        async_options=ocp.AsyncOptions(post_finalization_callback=before_commit),
    )


def reading(directory: epath.Path) -> ocp.CheckpointManager:
    return _manager(directory)


def _manager(directory: epath.Path, **options: Any) -> ocp.CheckpointManager:
    with quiet():
        return ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                create=False, enable_async_checkpointing=True, **options
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "info": ocp.JsonCheckpointHandler(filename=INFO_FILE),
            },
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops Orbax's own warnings while this package looks at a directory and reports by itself."""
    orbax = f"{os.sep}orbax{os.sep}"

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING or orbax not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def synchronize(what: str) -> None:
    """Waits until every process of the job is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
