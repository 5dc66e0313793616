"""Fine-tunes a checkpoint in Hugging Face's format on worked solutions.

The likelihood of the assistant's tokens alone is raised, by all parameters or by adapters; held-out
problems tell, before and after, how often the final answer is right. The result is a checkpoint
again, where `experiments.grpo_llm` can start.

Exit status: 0; 2 where something is wrong with what was given; 3 where training stopped since
numbers were not finite several steps in a row; 128 + n after signal n.
"""

from __future__ import annotations

import sys

from experiments.llm.config import SFT_PRESETS, SFT_RUNS, SFTConfig
from experiments.llm.run import fine_tune
from experiments.llm.run import main as run_main
from experiments.shared import runs


def parse(arguments: list[str]) -> SFTConfig:
    return runs.parse(
        SFTConfig,
        arguments,
        presets=SFT_PRESETS,
        default_preset="default",
        root=SFT_RUNS,
        program="sft",
        description=__doc__,
    )


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    return run_main("sft", parse, fine_tune, given)


if __name__ == "__main__":
    sys.exit(main())
