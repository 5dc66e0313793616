"""The TensorFlow Datasets builder of random_calculation; runs without TensorFlow.

The module's name and the class's name are what TensorFlow Datasets derives the data set's name
from. Import it through `data.builder`, which keeps the heavy import out of `import pgjax`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from pgjax.tasks.random_calculation import dataset, expressions

_SEED = 0


@dataclasses.dataclass(kw_only=True, eq=False)
class RandomCalculationConfig(tfds.core.BuilderConfig):
    """A preset and how much of it is drawn.

    Attributes:
      task: the expressions.
      levels: numbers of operators, in equal shares.
      train_per_level: training items per level.
      validation_per_level: validation items per level.
      test_per_level: test items per level.
      strict: see `dataset.make_items`.
    """

    task: expressions.Config = expressions.MICRO19
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)
    train_per_level: int = 20_000
    validation_per_level: int = 1024
    test_per_level: int = 1024
    strict: bool = True

    def recipe(self) -> str:
        """Everything the items depend on, to recognise data that other settings built."""
        return repr(
            (
                dataclasses.astuple(self.task),
                self.levels,
                self.train_per_level,
                self.validation_per_level,
                self.test_per_level,
                self.strict,
                _SEED,
            )
        )


class Builder(tfds.core.GeneratorBasedBuilder):
    """Arithmetic expressions in four presets, with direct and worked responses."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (the base class declares it)
    BUILDER_CONFIGS = [  # noqa: RUF012
        RandomCalculationConfig(
            name="micro19",
            description="Operands 1 to 9, values in [0, 19], operators + - *, levels 1 to 5.",
            task=expressions.MICRO19,
        ),
        RandomCalculationConfig(
            name="micro9",
            description="Operands 0 to 9, values in [0, 9], operators + - *, levels 1 to 5.",
            task=expressions.MICRO9,
        ),
        RandomCalculationConfig(
            name="mini99",
            description="Operands 0 to 9, values in [0, 99], operators + - *, levels 1 to 5.",
            task=expressions.MINI99,
        ),
        RandomCalculationConfig(
            name="paper",
            description="Integers, fractions, squares and cubes of 0 to 100 in LaTeX, levels 1-20.",
            task=expressions.PAPER,
            levels=tuple(range(1, 21)),
            train_per_level=700,
            validation_per_level=100,
            test_per_level=300,
            # Worked lines are not what is trained on here, and at 20 operators nearly every
            # expression contains some held-out pair of operators.
            strict=False,
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.settings()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "direct": tfds.features.Text(),
                    "worked": tfds.features.Text(),
                    # tf.train.Example knows no 64-bit floats, so decimals are stored as written.
                    "answer": tfds.features.Text() if config.task.latex else np.int32,
                    "level": np.int32,
                }
            ),
            metadata=tfds.core.MetadataDict(recipe=config.recipe()),
            # Items are drawn independently and read in random access: their order is no matter,
            # and keeping it makes an item's index its id.
            disable_shuffling=True,
        )

    def settings(self) -> RandomCalculationConfig:
        """The builder's configuration."""
        config = self.builder_config
        assert isinstance(config, RandomCalculationConfig)
        return config

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # nothing is downloaded
        config = self.settings()
        return {
            "train": self._generate_examples("train", config.train_per_level),
            "validation": self._generate_examples("validation", config.validation_per_level),
            "test": self._generate_examples("test", config.test_per_level),
        }

    def _generate_examples(self, split: str, per_level: int) -> Iterator[tuple[int, dict]]:
        config = self.settings()
        items = dataset.make_items(
            config.task,
            seed=_SEED,
            split=split,
            levels=config.levels,
            per_level=per_level,
            strict=config.strict,
        )
        for index, item in enumerate(items):
            example = item._asdict()
            if config.task.latex:
                example["answer"] = format(item.answer, ".15g")
            yield index, example
