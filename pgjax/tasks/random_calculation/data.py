"""Building the data set on first use and reading it back, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pgjax import _checks
from pgjax.tasks.random_calculation import splits
from pgjax.tasks.random_calculation.expressions import PRESETS

if TYPE_CHECKING:
    from pgjax.tasks.random_calculation.random_calculation_dataset_builder import (
        Builder,
        RandomCalculationConfig,
    )

_building = threading.Lock()


class Source(Sequence[dict[str, Any]]):
    """Random access to the items of a split, as plain Python values.

    An item is a dict of `id` (its index), `prompt`, `direct`, `worked` (str), `answer` (int or
    float) and `level` (int). The records (about 100 bytes each) are held in memory as they were
    read and decoded on access.
    """

    def __init__(
        self,
        records: Sequence[bytes],
        decode: Callable[[bytes], dict[str, Any]],
        *,
        levels: Sequence[int],
        name: str,
    ) -> None:
        self._records = records
        self._decode = decode
        self._name = name
        # The order of make_items: levels in turn.
        self.levels: np.ndarray = np.resize(np.asarray(levels, np.int32), len(records))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        i = index.__index__()
        if not -len(self) <= i < len(self):
            raise IndexError(f"index: expected one in [0, {len(self)}), got {i}")
        i %= len(self)
        record = self._decode(self._records[i])
        item: dict[str, Any] = {"id": i}
        for name in ("prompt", "direct", "worked"):
            item[name] = record[name].decode()
        answer = record["answer"]
        item["answer"] = float(answer) if isinstance(answer, bytes) else int(answer)
        item["level"] = int(record["level"])
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Source({self._name}, {len(self)} items)"


def builder(
    preset: str | RandomCalculationConfig, *, data_dir: str | os.PathLike[str] | None = None
) -> Builder:
    """The TensorFlow Datasets builder of a preset, nothing built yet.

    Args:
      preset: "micro9", "micro19", "mini99", "paper", or a `RandomCalculationConfig` of one's own
        with another name.
      data_dir: where data sets live; None for TensorFlow Datasets' own default.

    Raises:
      ValueError: an unknown preset.
    """
    if isinstance(preset, str):
        _checks.one_of("preset", preset, tuple(PRESETS))
    from pgjax.tasks.random_calculation import random_calculation_dataset_builder as module

    return module.Builder(config=preset, data_dir=None if data_dir is None else os.fspath(data_dir))


def _build(preset: str | RandomCalculationConfig, data_dir: str | os.PathLike[str] | None) -> None:
    made = builder(preset, data_dir=data_dir)
    directory = made.data_path
    print(f"Building {made.info.full_name} in {directory} (once)", file=sys.stderr)
    try:
        # It reports unknown download sizes on stdout; the progress bars on stderr stay.
        with contextlib.redirect_stdout(io.StringIO()):
            made.download_and_prepare(file_format="array_record")
    except OSError:
        # The directory appears at once, complete, by a rename. If another process renamed its
        # copy first, the two are equal and that one serves.
        if not (directory / "dataset_info.json").exists():
            raise


def data_source(
    preset: str | RandomCalculationConfig,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """Opens a split of the data set, building it on first use.

    Built data appear under their final name only when complete, so a build that was interrupted is
    simply repeated, and processes that build at the same time do not disturb each other.

    Args:
      preset: "micro9", "micro19", "mini99", "paper", or a `RandomCalculationConfig` of one's own.
      split: "train", "validation" or "test".
      data_dir: where data sets live; None for TensorFlow Datasets' own default
        (`TFDS_DATA_DIR`, else `~/tensorflow_datasets`).

    Returns:
      The items, in random access.

    Raises:
      ValueError: an unknown preset or split; data in the directory that other settings built.
      RuntimeError: data in the directory that are damaged, naming the directory to delete.
    """
    _checks.one_of("split", split, splits.SPLITS)
    import tensorflow_datasets as tfds

    opened = builder(preset, data_dir=data_dir)
    directory = opened.data_path  # may be remote
    if not directory.exists():
        with _building:  # threads of one process share TensorFlow Datasets' global state
            if not directory.exists():
                _build(preset, data_dir)
        opened = builder(preset, data_dir=data_dir)
    repair = f"delete {directory} and it will be built anew"
    if split not in opened.info.splits:
        raise RuntimeError(f"{directory}: the data set is damaged, no split {split!r}; {repair}")
    config = opened.settings()
    wanted = config.recipe()
    found = dict(opened.info.metadata or {}).get("recipe")
    if found != wanted:
        raise ValueError(
            f"data_dir: {directory} was built with other settings, {found}, not {wanted}; {repair}"
        )
    expected = opened.info.splits[split].num_examples
    try:
        raw = opened.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        if len(raw) != expected:
            raise ValueError(f"{len(raw)} records instead of {expected}")
        # One batched read: single random reads of an ArrayRecord cost some 50 times as much each.
        records = raw.__getitems__(list(range(expected)))
        source = Source(
            records,
            opened.info.features.deserialize_example_np,
            levels=config.levels,
            name=f"{opened.info.full_name}, {split}",
        )
        source[0], source[-1]
    except Exception as error:
        said = " ".join(str(error).split())  # some readers' messages have several lines
        raise RuntimeError(f"{directory}: the data set is damaged, {said}; {repair}") from error
    return source
