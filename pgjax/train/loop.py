"""The loop around a step: progress, metrics, evaluation, checkpoints, and a clean stop."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pgjax import parallel
from pgjax.train import checkpoints as checkpointing
from pgjax.train import metrics as recording
from pgjax.train import observing
from pgjax.train.state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


class Batches(Protocol):
    """An endless iterator whose position can be read and set, as Grain's are."""

    def __next__(self) -> Any: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Interrupted(RuntimeError):
    """The run was asked to stop; `step` is the step up to which it is saved."""

    def __init__(self, phase: str, step: int, signal_number: int) -> None:
        super().__init__(f"{phase}: stopped by {signal.Signals(signal_number).name} at step {step}")
        self.phase, self.step, self.signal_number = phase, step, signal_number


class NonFinite(RuntimeError):
    """Several updates in a row were skipped; `step` is the last, up to which the run is saved.

    A number that is not finite is behind each: see `make_update` and `keep_skipped`. Where the
    parameters themselves are `lost`, not finite either, none need have been skipped, and the run's
    newest checkpoint is an earlier one.
    """

    def __init__(
        self,
        phase: str,
        step: int,
        *,
        skipped: int,
        loss: float,
        gradient_norm: float,
        lost: bool = False,
    ) -> None:
        what = (
            f"the parameters are not finite after step {step}, and are not saved"
            if lost
            else f"{skipped} steps in a row skipped, the last of them step {step}"
        )
        super().__init__(f"{phase}: {what}: last loss {loss}, gradient norm {gradient_norm}")
        self.phase, self.step, self.skipped = phase, step, skipped
        self.loss, self.gradient_norm, self.lost = loss, gradient_norm, lost


class _StopSignal:
    """Remembers the first SIGINT or SIGTERM; a second one acts at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number


@contextlib.contextmanager
def _deferred_signals() -> Iterator[_StopSignal]:
    """Lets a step finish before a stop signal takes effect: a donated state is not readable."""
    stop = _StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _host(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def fit(
    step: Step,
    state: TrainState,
    batches: Batches,
    *,
    num_steps: int,
    phase: str,
    writer: recording.MetricsWriter | None = None,
    checkpoints: checkpointing.Checkpoints | None = None,
    checkpoint_every: int = 25,
    metadata: Mapping[str, Any] | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    progress_fields: tuple[str, ...] = ("reward", "entropy", "tokens/s"),
    on_step: Callable[[int, TrainState], str | None] | None = None,
    max_skipped: int = 5,
    profile: observing.Profile | None = None,
) -> TrainState:
    """Runs `step` from the state's own step count to `num_steps`.

    A state and batches restored from a checkpoint go on exactly as the uninterrupted run would.
    On SIGINT or SIGTERM the current step is finished, a checkpoint is written, and `Interrupted`
    is raised; a second signal stops at once. In a job of several processes a signal to any one
    stops all after the same step, and only the first shows its progress.

    Args:
      step: `(state, batch) -> (state, metrics)`; may donate the state. A metric `tokens` (a count)
        is also reported as `tokens/s`.
      state: at any step.
      batches: endless; its position is saved with every checkpoint.
      num_steps: the step to stop at.
      phase: name of this part of the run, in metrics and messages.
      writer: where metrics go; None for nowhere.
      checkpoints: where checkpoints go; None for nowhere.
      checkpoint_every: steps between checkpoints; the last step and a stop are always saved.
      metadata: JSON-serialisable, saved with every checkpoint.
      evaluate: metrics of the state, written under `phase + "_evaluation"` and used by
        `checkpoints` to tell the best.
      evaluate_every: steps between evaluations, 0 for none; the last step is always evaluated.
      progress_fields: metrics shown beside the progress bar.
      on_step: called after every step; a string it returns is printed above the progress bar.
      max_skipped: steps in a row with a metric `skipped_updates` above 0 (see `make_update`) after
        which the run is saved and stops; 0: it never does. A resumed run counts from 0. Unless 0,
        the run also stops, and does not save, where after a skipped step or before a checkpoint
        the parameters are not finite: an optimizer's own arithmetic has failed.
      profile: steps to trace.

    Records have, beside the step's metrics, `seconds` and `seconds_waiting` (for the batch), the
    step's `compilations` and `seconds_compiling`, and `device_memory_peak` where devices tell.

    Returns:
      the state at `num_steps`.

    Raises:
      Interrupted: after a stop signal.
      NonFinite: after `max_skipped` skipped steps in a row, or where the parameters are lost.
      ValueError: a `max_skipped` below 0.
      StopIteration: never silently: a `batches` that ends raises RuntimeError.
    """
    if max_skipped < 0:
        raise ValueError(f"max_skipped: expected at least 0, got {max_skipped}")
    start = int(state.step)
    skipped = 0  # steps in a row
    evaluated: dict[str, float] = {}  # of the current state, empty where it was not evaluated

    def save(at: int) -> None:
        if checkpoints is not None:
            checkpoints.save(
                at,
                state,
                metadata={**(metadata or {}), "phase": phase, "batches": batches.get_state()},
                metrics=evaluated,
            )

    with (
        contextlib.closing(profile) if profile is not None else contextlib.nullcontext(),
        _deferred_signals() as stop,
        recording.progress(
            num_steps,
            initial=start,
            fields=progress_fields,
            description=phase,
            shown=parallel.is_first(),
        ) as bar,
    ):
        if checkpoints is not None and start == 0 and checkpoints.latest_step() is None:
            save(0)
        for at in range(start + 1, num_steps + 1):
            if profile is not None:
                profile.before(at)
            watch, began = observing.Watch(), time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration as error:
                raise RuntimeError(f"{phase}: batches ended at step {at} of {num_steps}") from error
            waited = time.perf_counter() - began
            state, metrics = step(state, batch)
            values = _host(metrics)
            seconds = time.perf_counter() - began
            if profile is not None:
                profile.after(at)
            observed = watch.read()
            if "tokens" in values:
                values["tokens/s"] = values["tokens"] / seconds
            if writer is not None:
                times = {"seconds": seconds, "seconds_waiting": waited}
                writer.write(at, values | times | observed, phase=phase)
            bar.advance(values)
            message = on_step(at, state) if on_step is not None else None
            if message:
                bar.print(message)
            skipped = skipped + 1 if values.get("skipped_updates", 0.0) > 0 else 0
            last = at == num_steps
            evaluated = {}
            if evaluate is not None and (last or (evaluate_every and at % evaluate_every == 0)):
                evaluated = evaluate(state)
                if writer is not None:
                    writer.write(at, evaluated, phase=f"{phase}_evaluation")
            stopped_by = parallel.largest_of(stop.number or 0)
            stuck = 0 < max_skipped <= skipped
            due = bool(last or at % checkpoint_every == 0 or stopped_by or stuck)
            lost = max_skipped > 0 and (skipped > 0 or due) and not _all_finite(state.params)
            if due and not lost:
                save(at)
            if stuck or lost:
                if checkpoints is not None:
                    checkpoints.wait()
                raise NonFinite(
                    phase,
                    at,
                    skipped=skipped,
                    loss=values.get("loss", math.nan),
                    gradient_norm=values.get("gradient_norm", math.nan),
                    lost=lost,
                )
            if stopped_by and not last:
                if checkpoints is not None:
                    checkpoints.wait()
                raise Interrupted(phase, at, stopped_by)
    return state


@jax.jit
def _all_finite(tree: Any) -> Array:
    """Whether every real number in it is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]).all()
