"""Word problems and competition problems: loading, splitting, prompts, and a built-in generator."""

from pgjax.tasks.text_problems.datasets import load_tfds
from pgjax.tasks.text_problems.files import load_jsonl
from pgjax.tasks.text_problems.problems import Problem, Problems, split, within_length
from pgjax.tasks.text_problems.synthetic import synthetic

__all__ = [
    "Problem",
    "Problems",
    "load_jsonl",
    "load_tfds",
    "split",
    "synthetic",
    "within_length",
]
