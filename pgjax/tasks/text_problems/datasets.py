"""Problems from a data set that TensorFlow Datasets has prepared, read without TensorFlow."""

from __future__ import annotations

import os

from pgjax.tasks.text_problems.problems import Problem, Problems
from pgjax.tasks.text_problems.records import RecordError, problem_of


def load_tfds(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    question: str | None = None,
    answer: str | None = None,
) -> Problems:
    """Reads a split of a prepared data set, such as "gsm8k".

    Nothing is downloaded. Fields are found as by `load_jsonl`.

    Args:
      name: of the data set, as TensorFlow Datasets knows it.
      split: such as "train" or "test[:100]".
      data_dir: where data sets live; None for TensorFlow Datasets' own default.
      question, answer: as for `load_jsonl`.

    Raises:
      ImportError: tensorflow-datasets is missing.
      FileNotFoundError: a data set that is not known or not prepared, with how to prepare it.
      ValueError: no such split; records without the fields; no records.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "load_tfds needs tensorflow-datasets: pip install 'pgjax[experiments]'"
        ) from error
    where = None if data_dir is None else os.fspath(data_dir)
    prepare = (
        f"prepare it once, where there is a network and TensorFlow: tfds.load({name!r}, "
        f"data_dir={where!r}, download_and_prepare_kwargs={{'file_format': 'array_record'}})"
    )
    try:
        builder = tfds.builder(name, data_dir=where, try_gcs=False)
        prepared = (builder.data_path / "dataset_info.json").exists()
    except tfds.core.DatasetNotFoundError:
        prepared = False
    if not prepared:
        raise FileNotFoundError(
            f"name: no prepared data set {name!r} in "
            f"{where or 'the default data directory'}; {prepare}, or read a file by load_jsonl"
        )
    try:
        source = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(
            f"name: {name!r} in {builder.data_path} is stored in a format without random access; "
            f"delete it and {prepare}"
        ) from error
    except ValueError as error:
        known = sorted(builder.info.splits)
        raise ValueError(f"split: expected one of {known}, got {split!r}: {error}") from None
    problems: list[Problem] = []
    # One batched read: single random reads cost far more.
    for index, record in enumerate(source.__getitems__(list(range(len(source))))):
        try:
            problems.append(problem_of(record, question=question, answer=answer))
        except RecordError as error:
            raise ValueError(f"{name}, {split}, record {index}: {error}") from None
    return Problems(problems, name=f"{name}, {split}")
