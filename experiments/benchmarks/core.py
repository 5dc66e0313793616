"""pgjax's numeric core beside its nearest equals, on the same arrays, in one run.

Times are medians of runs taken in turn, given as ratios (ours / theirs, below 1 is faster); memory
is the compiled program's temporary memory; how far results differ is the last column. Exits with 1
where a limit is missed.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax

from experiments.benchmarks import advantages, harness, logprobs, returns

SECTIONS = {"returns": returns, "logprobs": logprobs, "advantages": advantages}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.core", description=__doc__
    )
    parser.add_argument(
        "--only", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS), metavar="SECTION",
        help=f"sections to run, of {', '.join(SECTIONS)}; default: all",
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, help="also write the rows to this JSON file")
    options = parser.parse_args(arguments)

    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}: {device.device_kind}")
    rows: list[harness.Row] = []
    for name in options.only:
        print(f"  {name} …", file=sys.stderr, flush=True)
        rows += SECTIONS[name].rows()
    return harness.finish(rows, options.out, device.device_kind)


if __name__ == "__main__":
    sys.exit(main())
