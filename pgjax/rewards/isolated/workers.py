"""Worker processes under hard time limits, killed and replaced when they do not answer."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from pgjax.rewards.isolated import sandbox

_START_SECONDS = 120.0
_SOFT = 0.8  # share of the time limit after which a worker interrupts itself
_LONGEST = 1 << 16

Answer = Mapping[str, Any]


class Worker:
    """One process. A thread passes on what it says, and at last that it has ended."""

    def __init__(
        self, events: queue.SimpleQueue[Any], process: subprocess.Popen[bytes], opening: bytes
    ) -> None:
        self.process = process
        self.ready = False
        self.job: int | None = None
        self.family: frozenset[int] | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()
        self._write(opening)

    def _listen(self, events: queue.SimpleQueue[Any]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            while line := stream.readline(_LONGEST):
                events.put((self, line))
        events.put((self, None))

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended; its last event says so
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def ask(self, job: int, request: Mapping[str, Any], seconds: float) -> None:
        self.job, self.deadline = job, time.monotonic() + seconds
        self._write(json.dumps({**request, "seconds": seconds * _SOFT}).encode() + b"\n")

    def has_more_processes(self) -> bool:
        """Whether there are others below it than when it was ready."""
        below = sandbox.descendants(self.process.pid)
        return self.family is not None and not self.family.issuperset(below)

    def kill(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        sandbox.destroy(self.process)


def _kill_all(workers: list[Worker]) -> None:
    while workers:
        workers.pop().kill()


class WorkerPool:
    """Requests and answers in JSON, one a line, over the streams of processes.

    None runs before the first request. A process says `ready` or `failed`, then answers each
    request, in which `seconds` says after which time it should interrupt itself.

    Args:
      start: a new process with pipes as its input and output.
      workers: most processes.
      name: of what a process is, in errors.
      opening: what each is told before it is ready.
      watched: whether a process that has started others is replaced, and they are killed.
    """

    def __init__(
        self,
        start: Callable[[], subprocess.Popen[bytes]],
        *,
        workers: int,
        name: str,
        opening: bytes = b"",
        watched: bool = False,
    ) -> None:
        self.start = start
        self.size = workers
        self.name = name
        self.opening = opening
        self.watched = watched
        self._workers: list[Worker] = []
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._owner = os.getpid()
        # Also runs when the interpreter ends.
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that were started and run now."""
        return tuple(w.process.pid for w in self._workers)

    def close(self) -> None:
        """Ends all processes; the next `ask` starts new ones."""
        if self._owner == os.getpid():
            with self._lock:
                _kill_all(self._workers)

    def ask(self, requests: Sequence[Mapping[str, Any]], *, timeout: float) -> list[Answer]:
        """The answer to each request within `timeout` seconds. May be called from any thread.

        A worker interrupts itself after most of that time; one that cannot (inside a single long
        operation) is killed when it is over, and replaced.

        Returns:
          what the worker said, or `{"error": "timeout"}` or `{"error": "crash"}`.

        Raises:
          RuntimeError: a worker does not start.
        """
        if self._owner != os.getpid():  # after a fork the processes are the parent's
            self._workers.clear()
            self._events, self._lock = queue.SimpleQueue(), threading.Lock()
            self._owner = os.getpid()
        with self._lock:
            try:
                return self._ask(requests, timeout)
            except BaseException:
                _kill_all(self._workers)
                raise

    def _ask(self, requests: Sequence[Mapping[str, Any]], timeout: float) -> list[Answer]:
        waiting = collections.deque(range(len(requests)))
        answers: list[Answer | None] = [None] * len(requests)
        left = len(requests)
        while left:
            for worker in [
                w for w in self._workers if w.process.poll() is not None and w.job is None
            ]:
                self._workers.remove(worker)  # ended while it had nothing to do
                worker.kill()
            busy = sum(w.job is not None for w in self._workers)
            while len(self._workers) < min(self.size, busy + len(waiting)):
                self._workers.append(Worker(self._events, self.start(), self.opening))
            for worker in self._workers:
                if worker.ready and worker.job is None and waiting:
                    job = waiting.popleft()
                    worker.ask(job, requests[job], timeout)
            for job, answer in self._next():
                answers[job] = answer
                left -= 1
        return [a for a in answers if a is not None]

    def _next(self) -> list[tuple[int, Answer]]:
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
        message = _parsed(line)
        if message is None:
            return self._end(worker, "crash")
        if "ready" in message:
            worker.ready = True
            if self.watched:
                worker.family = frozenset(sandbox.descendants(worker.process.pid))
        elif "failed" in message:
            raise RuntimeError(f"a {self.name} worker does not start: {message['failed']}")
        elif message.get("error") == "memory":
            return self._end(worker, "memory")
        elif worker.job is not None:
            job, worker.job = worker.job, None
            if self.watched and worker.has_more_processes():
                self._end(worker, "")
            return [(job, message)]
        return []

    def _end(self, worker: Worker, error: str) -> list[tuple[int, Answer]]:
        """Ends a process; its request, where it had one, is answered by the error."""
        self._workers.remove(worker)
        if error == "crash":  # it is about to, and its own exit code says more than ours
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(1)
        worker.kill()
        if not worker.ready:
            code = worker.process.returncode
            raise RuntimeError(f"a {self.name} worker does not start: {error}, exit code {code}")
        return [] if worker.job is None else [(worker.job, {"error": error})]


def _parsed(line: bytes | None) -> Answer | None:
    """A message; None: the process has ended, or says what is none."""
    if line is None or not line.endswith(b"\n"):
        return None
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
