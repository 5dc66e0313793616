"""The program of a worker process: symbolic comparison of two answers, one request a line.

It is started by its path and imports neither this package nor JAX, so that it starts fast, takes
little memory and can be killed at any moment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from typing import Any


class TimeUp(BaseException):
    """The soft time limit; no `except Exception` in between can swallow it."""


def _raise_time_up(number: int, frame: Any) -> None:
    raise TimeUp


def _limit(name: str, value: int) -> None:
    """Lowers one of the process's limits where the system knows it."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard < 0 else min(value, hard), hard))


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system


class Comparer:
    """math-verify, restricted to its LaTeX grammar.

    The grammar is a parser of its own. math-verify's other extraction hands text to SymPy's
    `parse_expr`, which evaluates Python, and is not used. Its own time limits are off, since
    they need signals of their own.
    """

    def __init__(self) -> None:
        import math_verify
        from latex2sympy2_extended.math_normalization import NormalizationConfig

        logging.disable(logging.CRITICAL)
        self.verify = math_verify.verify
        self.parse = math_verify.parse
        self.extraction = (
            math_verify.LatexExtractionConfig(
                boxed_match_priority=0,
                normalization_config=NormalizationConfig(
                    basic_latex=True,
                    units=False,
                    malformed_operators=True,
                    nits=True,
                    boxed="last",
                    equations=False,
                ),
            ),
        )
        self.same("x+1", "1+x")  # loads the grammar

    def _expressions(self, answer: str) -> list[Any]:
        return self.parse(
            rf"\boxed{{{answer}}}",
            self.extraction,
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
        )

    def same(self, prediction: str, reference: str) -> bool:
        """Whether the answers are equal as expressions; False where either cannot be read."""
        right = self._expressions(reference)
        given = self._expressions(prediction) if right else []
        if not given:
            return False
        return bool(self.verify(right, given, float_rounding=6, timeout_seconds=None))


def main() -> None:
    # What a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    _limit("RLIMIT_AS", int(sys.argv[1]))
    _limit("RLIMIT_CORE", 0)
    try:
        comparer = Comparer()
    except BaseException as error:
        reply(failed=f"{type(error).__name__}: {error}")
        return
    alarms = hasattr(signal, "setitimer")
    if alarms:
        signal.signal(signal.SIGALRM, _raise_time_up)
    reply(ready=os.getpid())
    for line in sys.stdin:
        request = json.loads(line)
        # Should the parent die meanwhile, nobody is left to kill a computation that never ends.
        _limit("RLIMIT_CPU", int(_cpu_seconds() + request["seconds"]) + 5)
        try:
            if alarms:
                signal.setitimer(signal.ITIMER_REAL, request["seconds"])
            try:
                same = comparer.same(request["prediction"], request["reference"])
            finally:
                if alarms:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            reply(same=same)
        except TimeUp:
            reply(error="timeout")
        except MemoryError:
            reply(error="memory")
            return  # what is left of this process is not to be trusted
        except RecursionError:
            reply(error="recursion")
        except Exception as error:
            reply(error=f"{type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    main()
