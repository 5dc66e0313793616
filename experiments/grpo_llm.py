"""Post-trains a checkpoint in Hugging Face's format by policy gradient.

Problems with checkable answers (GSM8K- or MATH-style files, or generated ones) are put to the
model; a verifier judges each completion's final answer; any objective of the library makes the
right ones more likely, by all parameters or by adapters. The result is a checkpoint again.

Exit status: 0; 2 where something is wrong with what was given; 3 where training stopped since
numbers were not finite several steps in a row; 128 + n after signal n.
"""

from __future__ import annotations

import sys

from experiments.llm.config import GRPO_PRESETS, GRPO_RUNS, GRPOConfig
from experiments.llm.run import main as run_main
from experiments.llm.run import reinforce
from experiments.shared import runs


def parse(arguments: list[str]) -> GRPOConfig:
    return runs.parse(
        GRPOConfig,
        arguments,
        presets=GRPO_PRESETS,
        default_preset="default",
        root=GRPO_RUNS,
        program="grpo_llm",
        description=__doc__,
    )


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    return run_main("grpo_llm", parse, reinforce, given)


if __name__ == "__main__":
    sys.exit(main())
