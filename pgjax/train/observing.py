"""What a step costs beside its result: compilations, device memory, traces of the profiler."""

from __future__ import annotations

import dataclasses
import os
import threading

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class _Compilations:
    """Programs compiled by this process so far, and the seconds it took."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            with self._lock:
                self.count += 1
                self.seconds += duration_secs


_compilations: _Compilations | None = None


class Watch:
    """What happens from its making on."""

    def __init__(self) -> None:
        global _compilations  # JAX has no public way to take a listener away again: one for all
        if _compilations is None:
            _compilations = _Compilations()
        self._total = _compilations
        self._count, self._seconds = self._total.count, self._total.seconds

    def read(self) -> dict[str, float]:
        """Metrics of the time since then.

        `compilations` and `seconds_compiling`; `device_memory` and `device_memory_peak` in bytes,
        the most of this process's devices, where the backend tells (CPUs do not).
        """
        found = {
            "compilations": float(self._total.count - self._count),
            "seconds_compiling": self._total.seconds - self._seconds,
        }
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        for name, key in (
            ("device_memory", "bytes_in_use"),
            ("device_memory_peak", "peak_bytes_in_use"),
        ):
            values = [s[key] for s in stats if key in s]
            if values:
                found[name] = float(max(values))
        return found


@dataclasses.dataclass
class Profile:
    """A trace of some steps, for TensorBoard's profile plugin, XProf or Perfetto.

    Attributes:
      directory: where it goes.
      first: the first step traced; a later one than 1 leaves out compilation.
      steps: how many.
    """

    directory: str | os.PathLike[str]
    first: int
    steps: int = 3
    _running: bool = dataclasses.field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.first < 1 or self.steps < 1:
            raise ValueError(
                "profile: expected a first step and a number of steps of at least 1, got "
                f"{self.first} and {self.steps}"
            )

    def before(self, step: int) -> None:
        """Begins the trace where it is to begin; called before every step."""
        if step == self.first:
            jax.profiler.start_trace(os.fspath(self.directory))
            self._running = True

    def after(self, step: int) -> None:
        """Ends it; called when a step's results are there, and with any step at the end."""
        if self._running and step >= self.first + self.steps - 1:
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
