"""The program of a verifier's process: judges one completion after the other.

Started by path in a fresh interpreter. What it reads was pickled by the process that started it;
its answers are JSON, so that nothing a verifier does can make them more than data.
"""

from __future__ import annotations

import base64
import contextlib
import json
import numbers
import os
import pickle
import resource
import signal
import sys
from typing import Any


class TimeUp(BaseException):
    """The soft time limit; no `except Exception` in between can swallow it."""


def _raise_time_up(number: int, frame: Any) -> None:
    raise TimeUp


def unpacked(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def as_number(value: Any) -> float | None:
    """What `rewards.verifier` takes for one number, without importing JAX."""
    if isinstance(value, numbers.Real) or type(value).__name__ in ("bool_", "bool"):
        return float(value)
    if getattr(value, "shape", None) == () and value.dtype.kind in "biuf":
        return float(value)
    return None


def limit_memory(more: int) -> None:
    """To what this process has now, its imports, and so many bytes."""
    with contextlib.suppress(OSError, ValueError):  # a system that does not say or cannot limit
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def main() -> None:
    requests = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # what a verifier prints must not end up among the answers
        os.dup2(nothing, stream)

    def reply(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    opening = json.loads(requests.readline())
    sys.path[:] = opening["path"]
    try:
        verifier = unpacked(opening["verifier"])
    except BaseException as error:
        reply(failed=told(error))
        return
    if opening["memory_bytes"]:
        limit_memory(opening["memory_bytes"])
    signal.signal(signal.SIGALRM, _raise_time_up)
    reply(ready=True)
    for line in requests:
        request = json.loads(line)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, request["seconds"])
                value = verifier(*unpacked(request["call"]))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            number = as_number(value)
            given = f"{type(value).__name__}: {value!r:.80}" if number is None else ""
        except TimeUp:
            reply(error="timeout")
        except MemoryError:
            reply(error="memory")
            return  # what is left of this process is not to be trusted
        except BaseException as error:  # of whatever kind, it is the verifier's
            reply(error=told(error))
        else:
            reply(given=given) if number is None else reply(reward=number)


if __name__ == "__main__":
    main()
