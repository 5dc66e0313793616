"""Verifiers in processes of their own."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgjax import _checks
from pgjax.rewards.isolated import sandbox
from pgjax.rewards.isolated.sandbox import Limits
from pgjax.rewards.isolated.workers import Answer, WorkerPool
from pgjax.rewards.verifier import Failure

_WORKER = Path(__file__).with_name("worker.py")


class VerifierPool(WorkerPool):
    """A verifier in worker processes: whatever it does, every completion gets its result in time.

    Of a completion on which the verifier raises, hangs, ends its process or takes more memory than
    it may, the reward is NaN and the failure is reported; the worker is replaced where it must be.
    What a verifier prints is dropped, and processes it leaves behind are killed. Workers see no
    accelerator, none of this process's environment but paths and language, and no network where
    `sandbox.isolates()`.

        with VerifierPool(verifier, workers=8, limits=Limits(seconds=5)) as pool:
            rewards, failures = pool.judge(completions, examples)

    `train.text.host_reward` takes one in the place of a verifier. Workers end with this process.
    """

    def __init__(
        self,
        verifier: Callable[[Any, Mapping[str, Any]], Any],
        *,
        workers: int = 2,
        limits: Limits = Limits(),  # noqa: B008, frozen
    ) -> None:
        """No process is started before the first completion.

        Args:
          verifier: `(completion, example) -> reward`, a number. Pickled, so it has a name in a
            module, or is a partial of what has.
          workers: how many judge at the same time, at most.
          limits: of one verdict.

        Raises:
          ValueError: a verifier that cannot be pickled.
        """
        _checks.in_range("workers", workers, 1)
        self.limits = limits
        opening = {
            "path": sys.path,
            "memory_bytes": limits.memory_bytes,
            "verifier": _packed("verifier", verifier),
        }
        super().__init__(
            self._process,
            workers=workers,
            name="verifier's",
            opening=json.dumps(opening).encode() + b"\n",
            watched=True,
        )

    def _process(self) -> subprocess.Popen[bytes]:
        return sandbox.spawn(
            [sys.executable, "-I", str(_WORKER)],
            self.limits,
            env=sandbox.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )

    def judge(
        self, completions: Sequence[Any], examples: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[Failure]]:
        """As `rewards.call_verifier`.

        Takes at most about `limits.seconds · ceil(N / workers)`, and what replacing workers takes.

        Args:
          completions: N texts or rows of tokens.
          examples: N items.

        Returns:
          rewards: f32 `[N]`, NaN where there is none.
          failures: those, in order. The error is a TimeoutError, a MemoryError, or a RuntimeError
            with what the verifier raised.

        Raises:
          ValueError: unequal lengths; a result that is not one real number; what cannot be pickled.
          RuntimeError: the verifier cannot be loaded in a process of its own.
        """
        if len(completions) != len(examples):
            raise ValueError(
                f"examples: expected one for each of {len(completions)} completions, "
                f"got {len(examples)}"
            )
        requests = [
            {"call": _packed(f"completions[{i}], examples[{i}]", pair)}
            for i, pair in enumerate(zip(completions, examples, strict=True))
        ]
        rewards = np.full(len(requests), np.nan, np.float32)
        failures = []
        answers = self.ask(requests, timeout=self.limits.seconds)
        for i, answer in enumerate(answers):
            if "given" in answer:
                raise ValueError(
                    f"verifier: expected one number for completion {i}, got {answer['given']}"
                )
            rewards[i], error = self._result(answer)
            if error is not None:
                failures.append(Failure(i, error))
        return rewards, failures

    def _result(self, answer: Answer) -> tuple[float, Exception | None]:
        reward, error = answer.get("reward"), answer.get("error")
        if isinstance(reward, int | float):
            if np.isfinite(np.float32(reward)):
                return float(reward), None
            return np.nan, ValueError(f"the verifier returned {reward!r}")
        known = {
            "timeout": TimeoutError(f"no verdict in {self.limits.seconds:g} s"),
            "memory": MemoryError(f"more than {self.limits.memory_bytes} bytes"),
            "crash": RuntimeError("the verifier ended its process"),
        }
        return np.nan, known.get(str(error), RuntimeError(str(error)))


def _packed(name: str, value: Any) -> str:
    try:
        return base64.b64encode(pickle.dumps(value)).decode()
    except Exception as error:
        raise ValueError(f"{name}: cannot be pickled: {error}") from error
