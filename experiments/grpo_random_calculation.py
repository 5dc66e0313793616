"""Teaches a small language model arithmetic by policy gradient, from scratch.

A supervised warm-up on RandomCalculation gives a model with two habits, answering directly and
writing out the worked lines; then any objective, with only the final answer's correctness as
reward, makes it choose the better habit and sharpen it. Nothing is downloaded.

Exit status: 0; 2 where something is wrong with what was given; 3 where training stopped since
numbers were not finite several steps in a row; 128 + n after signal n.
"""

from __future__ import annotations

import sys

import pgjax as pg
from experiments.random_calculation import config, report, run
from experiments.shared import runs


def main(arguments: list[str] | None = None) -> int:
    try:
        settings = config.parse(
            sys.argv[1:] if arguments is None else arguments, description=__doc__
        )
        result = run.run(settings)
    except pg.train.Interrupted as stop:
        where = "" if settings.out is None else f" --out {settings.out}"
        print(
            f"\n{stop}. Continue with:\n"
            f"  python -m experiments.grpo_random_calculation --resume{where}"
        )
        return 128 + stop.signal_number
    except pg.train.NonFinite as stuck:
        return runs.explain(
            stuck, program="grpo_random_calculation", out=settings.out, root=config.RUNS
        )
    except runs.USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None:
        report.print_report(settings, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
