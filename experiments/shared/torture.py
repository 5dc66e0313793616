"""A training step whose verifier misbehaves, and what that leaves of the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pgjax as pg
from experiments.shared import bad_verifiers
from pgjax.rewards.isolated import Limits, VerifierPool, sandbox
from pgjax.tasks import random_calculation as task

Kind = Literal["hang", "deaf", "raise", "exit", "flood", "print", "child", "orphan"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MEANINGS: dict[Kind, str] = {
    "hang": "hangs",
    "deaf": "hangs and ignores signals",
    "raise": "raises",
    "exit": "exits the process",
    "flood": "allocates past its limit",
    "print": "prints without end",
    "child": "leaves a child running",
    "orphan": "leaves a child, and exits",
}
# What is to be logged of such a sample; a verifier that leaves a child has judged it.
REASONS: dict[Kind, tuple[type[Exception], str] | None] = {
    "hang": (TimeoutError, "no verdict"),
    "deaf": (TimeoutError, "no verdict"),
    "raise": (RuntimeError, "KeyError: 'no such answer'"),
    "exit": (RuntimeError, "ended its process"),
    "flood": (MemoryError, "more than"),
    "print": (TimeoutError, "no verdict"),
    "child": None,
    "orphan": (RuntimeError, "ended its process"),
}
REPLACED = ("deaf", "exit", "flood", "child", "orphan")  # workers that are not used again
PROMPTS, SAMPLES = 4, 4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One training step with misbehaving samples.

    Attributes:
      name: of the kind, or of the mixture.
      bad, samples: how many misbehave, of how many.
      seconds: the step.
      bound: the step without a verifier, `limits.seconds · ceil(N / workers)`, and the start of
        every worker that is to be replaced.
      invalid: samples without a reward.
      unaccounted: what is wrong with rewards, logged reasons and the updated parameters.
      left: what the step and its pool leave behind.
      memory: bytes by which this process has grown.
    """

    name: str
    bad: int
    samples: int
    seconds: float
    bound: float
    invalid: int
    unaccounted: list[str]
    left: list[str]
    memory: int


class Rack:
    """A tiny decoder's GRPO step, whose samples are judged in worker processes."""

    def __init__(self, limits: Limits, *, workers: int = 2) -> None:
        self.limits, self.workers = limits, workers
        config = pg.models.DecoderConfig(
            vocab_size=task.VOCAB_SIZE, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2,
            mlp_size=32, max_length=24,
        )  # fmt: skip
        self.decoder, params = pg.models.init(config, jax.random.key(0))
        optimizer = optax.adam(1e-3)
        self.params = {"decoder": params}
        self.initial = lambda: pg.train.init(
            jax.tree.map(jnp.copy, self.params), optimizer, jax.random.key(1)
        )
        self.update = pg.train.make_update(
            pg.train.language_model_outputs(self.decoder), pg.objectives.grpo(), optimizer
        )
        problems = ["3+4=", "2*2=", "7-1=", "9-4="]
        self.batch = task.prompt_batch(problems, length=6)
        self.mark = f"86400.{os.getpid()}{time.time_ns() % 10**6:06d}"
        self._step(lambda samples, batch, key: jnp.arange(PROMPTS * SAMPLES) % 2.0)  # compiles
        self.step_seconds = self._step(lambda *_: jnp.arange(PROMPTS * SAMPLES) % 2.0)[0]
        with self._pool(workers=1) as pool:
            began = time.perf_counter()
            pool.judge(["1"], [self.example])
            self.start_seconds = time.perf_counter() - began

    @property
    def example(self) -> dict[str, str]:
        return {"answer": "1", "sleep": self.mark}

    def _pool(self, workers: int) -> VerifierPool:
        return VerifierPool(bad_verifiers.verdict, workers=workers, limits=self.limits)

    def _step(self, reward: Any) -> tuple[float, Any, dict[str, float], np.ndarray]:
        """Seconds, the state afterwards, metrics and rewards."""
        seen = []
        step = pg.train.make_text_step(
            self.decoder,
            self.update,
            reward,
            on_samples=lambda at, samples, scores: seen.append(np.asarray(scores)),
            num_samples=SAMPLES,
            max_new_tokens=8,
            stop_tokens=(task.EOS,),
        )
        state = self.initial()
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, self.batch))
        seconds = time.perf_counter() - began
        return seconds, state, {name: float(value) for name, value in metrics.items()}, seen[0]

    def _judged_step(
        self, pool: VerifierPool, completions: Sequence[str]
    ) -> tuple[float, Any, dict[str, float], np.ndarray]:
        """A step whose samples decode to these texts."""
        texts = iter(completions)
        return self._step(
            pg.train.host_reward(
                pool, lambda ids: next(texts), lambda batch: [self.example] * PROMPTS
            )
        )

    def torture(self, name: str, kinds: Sequence[Kind]) -> Outcome:
        """One step in which a quarter of the samples, or one for each kind, misbehave."""
        count = PROMPTS * SAMPLES
        completions = ["1" if i % 3 else "0" for i in range(count)]
        times = max(count // 4, len(kinds)) if kinds else 0
        bad = {i * count // times: kinds[i % len(kinds)] for i in range(times)}
        for place, kind in bad.items():
            completions[place] = kind
        with tempfile.TemporaryDirectory(prefix="pgjax_torture_") as scratch:
            before = _Machine(self.mark, scratch)
            with before.own_directory(), self._pool(self.workers) as pool:
                self._judged_step(pool, ["1"] * count)  # starts the workers
                with _logged() as failures:
                    seconds, state, metrics, rewards = self._judged_step(pool, completions)
                strays = marked(self.mark)
            left = before.left()
        left += [f"process {pid} after the step" for pid in strays]
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)
        unaccounted = _unaccounted(completions, bad, rewards, failures, metrics)
        leaves = jax.tree.leaves(state.params)
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            unaccounted.append("parameters that are not finite")
        if all(
            np.array_equal(a, b) for a, b in zip(leaves, jax.tree.leaves(self.params), strict=True)
        ):
            unaccounted.append("the update changed nothing")
        replaced = sum(kind in REPLACED for kind in bad.values())
        return Outcome(
            name=name,
            bad=len(bad),
            samples=count,
            seconds=seconds,
            bound=self.step_seconds
            + self.limits.seconds * math.ceil(count / self.workers)
            + self.start_seconds * replaced,
            invalid=int(np.isnan(rewards).sum()),
            unaccounted=unaccounted,
            left=left,
            memory=before.growth(),
        )


def _unaccounted(
    completions: Sequence[str],
    bad: dict[int, Kind],
    rewards: np.ndarray,
    failures: Sequence[pg.rewards.Failure],
    metrics: dict[str, float],
) -> list[str]:
    found = []
    logged = {failure.index: failure.error for failure in failures}
    for i, completion in enumerate(completions):
        reason = REASONS[bad[i]] if i in bad else None
        want = np.nan if reason else float(completion != "0")
        if not np.array_equal(rewards[i], want, equal_nan=True):
            found.append(f"sample {i}, {completion}: reward {rewards[i]}, expected {want}")
        error = logged.pop(i, None)
        if reason is None and error is not None:
            found.append(f"sample {i}, {completion}: logged {error!r}")
        elif reason and not (isinstance(error, reason[0]) and reason[1] in str(error)):
            found.append(f"sample {i}, {completion}: logged {error!r}, expected {reason}")
    found += [f"logged sample {i}, which there is not" for i in logged]
    invalid = metrics["invalid_rewards"] * len(completions)
    if round(invalid) != sum(REASONS[kind] is not None for kind in bad.values()):
        found.append(f"metric invalid_rewards: {metrics['invalid_rewards']}")
    return found


@contextlib.contextmanager
def _logged() -> Iterator[list[pg.rewards.Failure]]:
    """The verifier's failures that a step logs; they are not printed."""
    failures: list[pg.rewards.Failure] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            arguments = record.args if isinstance(record.args, tuple) else ()
            failures.extend(a for a in arguments if isinstance(a, pg.rewards.Failure))

    logger, handler = logging.getLogger("pgjax.train"), Keep()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield failures
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def marked(mark: str) -> list[int]:
    """Processes of this machine that have the mark among their arguments."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


class _Machine:
    """What there is before a step, to be compared with what there is after it."""

    def __init__(self, mark: str, scratch: str) -> None:
        self.mark, self.scratch = mark, scratch
        self.children = self._children()
        self.threads = set(threading.enumerate())
        self.descriptors = self._descriptors()
        self.resident = _resident()

    @contextlib.contextmanager
    def own_directory(self) -> Iterator[None]:
        """Temporary files of this process go where no one else's are."""
        previous, tempfile.tempdir = tempfile.tempdir, self.scratch
        try:
            yield
        finally:
            tempfile.tempdir = previous

    def _children(self) -> set[int]:
        """Of this process and of theirs, and its own that have ended and were not waited for."""
        own = pathlib.Path("/proc/self/task").glob("*/children")
        direct = {int(word) for path in own for word in path.read_text().split()}
        return direct | set(sandbox.descendants(os.getpid()))

    def _descriptors(self) -> dict[int, str]:
        found = {}
        for path in pathlib.Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found[int(path.name)] = os.readlink(path)
        return {number: name for number, name in found.items() if not name.startswith("/proc/")}

    def left(self) -> list[str]:
        """What there is more than before."""
        deadline = time.monotonic() + 5.0
        while set(threading.enumerate()) - self.threads and time.monotonic() < deadline:
            time.sleep(0.01)  # a thread that has read its worker's last words is about to end
        now = self._descriptors()
        return [
            *(f"process {pid}" for pid in sorted(self._children() - self.children)),
            *(f"process {pid}, a verifier's child" for pid in marked(self.mark)),
            *(f"thread {t.name}" for t in set(threading.enumerate()) - self.threads),
            *(f"descriptor of {now[n]}" for n in sorted(now.keys() - self.descriptors.keys())),
            *(f"file {path}" for path in sorted(pathlib.Path(self.scratch).rglob("*"))),
        ]

    def growth(self) -> int:
        return _resident() - self.resident


def _resident() -> int:
    words = pathlib.Path("/proc/self/statm").read_text().split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE")
