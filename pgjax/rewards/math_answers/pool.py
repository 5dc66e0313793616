"""Worker processes under hard time limits, killed and replaced when they do not answer."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

_PROGRAM = pathlib.Path(__file__).with_name("worker.py")
_START_SECONDS = 120.0
_SOFT = 0.8  # share of the time limit after which a worker interrupts itself


class Outcome(NamedTuple):
    """Of one comparison: whether the two are the same, or why that is not known."""

    same: bool
    error: str | None = None


class _Worker:
    """One process. A thread passes on what it says, and at last that it has ended."""

    def __init__(self, events: queue.SimpleQueue[Any], memory_limit: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), str(memory_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
        )
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def _listen(self, events: queue.SimpleQueue[Any]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                events.put((self, line))
        events.put((self, None))

    def ask(self, job: int, pair: tuple[str, str], seconds: float) -> None:
        assert self.process.stdin is not None
        self.job, self.deadline = job, time.monotonic() + seconds
        request = {"prediction": pair[0], "reference": pair[1], "seconds": seconds * _SOFT}
        with contextlib.suppress(OSError):  # it has ended; its last event says so
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


class Pool:
    """Compares pairs of answers in processes of their own; none runs before the first pair.

    Args:
      workers: most processes.
      memory_limit: bytes of address space of each.
    """

    def __init__(self, *, workers: int, memory_limit: int) -> None:
        self.size = workers
        self.memory_limit = memory_limit
        self.started = 0
        self._workers: list[_Worker] = []
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._owner = os.getpid()
        # Also runs when the interpreter ends.
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that run now."""
        return tuple(w.process.pid for w in self._workers)

    def close(self) -> None:
        """Ends all processes; the next `run` starts new ones."""
        if self._owner == os.getpid():
            with self._lock:
                _kill_all(self._workers)

    def run(self, pairs: Sequence[tuple[str, str]], *, timeout: float) -> list[Outcome]:
        """Compares every pair, each within `timeout` seconds. May be called from any thread.

        A worker interrupts itself after most of that time; one that cannot (inside a single long
        operation) is killed when it is over, and replaced.

        Raises:
          ImportError: math-verify is not installed.
          RuntimeError: a worker does not start.
        """
        if not pairs:
            return []
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("comparing these answers needs math-verify: pip install 'pgjax[hf]'")
        if self._owner != os.getpid():  # after a fork the processes are the parent's
            self._workers.clear()
            self._events, self._lock = queue.SimpleQueue(), threading.Lock()
            self._owner = os.getpid()
        with self._lock:
            try:
                return self._run(pairs, timeout)
            except BaseException:
                _kill_all(self._workers)
                raise

    def _run(self, pairs: Sequence[tuple[str, str]], timeout: float) -> list[Outcome]:
        waiting = collections.deque(range(len(pairs)))
        outcomes: list[Outcome | None] = [None] * len(pairs)
        left = len(pairs)
        while left:
            for worker in [
                w for w in self._workers if w.process.poll() is not None and w.job is None
            ]:
                self._workers.remove(worker)  # ended while it had nothing to do
            busy = sum(w.job is not None for w in self._workers)
            while len(self._workers) < min(self.size, busy + len(waiting)):
                self._workers.append(_Worker(self._events, self.memory_limit))
                self.started += 1
            for worker in self._workers:
                if worker.ready and worker.job is None and waiting:
                    job = waiting.popleft()
                    worker.ask(job, pairs[job], timeout)
            for job, outcome in self._next():
                outcomes[job] = outcome
                left -= 1
        return [o for o in outcomes if o is not None]

    def _next(self) -> list[tuple[int, Outcome]]:
        """What happens next: an answer, the end of a process or of somebody's time."""
        active = [w for w in self._workers if w.job is not None or not w.ready]
        pause = min(w.deadline for w in active) - time.monotonic()
        try:
            worker, line = self._events.get(timeout=max(pause, 0.0))
        except queue.Empty:
            late = [w for w in active if w.deadline <= time.monotonic()]
            return [ended for w in late for ended in self._end(w, "timeout")]
        if worker not in self._workers:  # the last words of one that was killed
            return []
        if line is None:
            return self._end(worker, "crash")
        message = json.loads(line)
        if "ready" in message:
            worker.ready = True
        elif "failed" in message:
            raise RuntimeError(f"a math-verify worker does not start: {message['failed']}")
        elif message.get("error") == "memory":
            return self._end(worker, "memory")
        elif worker.job is not None:
            job, worker.job = worker.job, None
            return [(job, Outcome(message.get("same", False), message.get("error")))]
        return []

    def _end(self, worker: _Worker, error: str) -> list[tuple[int, Outcome]]:
        """Ends a process; its comparison, where it had one, is answered by the error."""
        self._workers.remove(worker)
        worker.kill()
        if not worker.ready:
            code = worker.process.returncode
            raise RuntimeError(f"a math-verify worker does not start: {error}, exit code {code}")
        return [] if worker.job is None else [(worker.job, Outcome(False, error))]
