"""Batches whose update was skipped, kept for whoever asks why."""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax import _paths
from pgjax.train.state import TrainState
from pgjax.train.update import Metrics, Update
from pgjax.types import PolicyOutputs, Rollout, TokenSupport

_log = logging.getLogger("pgjax.train")

_DTYPES = "dtypes"  # of those arrays whose dtype NumPy's format does not have, as JSON
_SHOWN_ROWS = 10


def keep_skipped(update: Update, directory: str | os.PathLike[str], *, keep: int = 10) -> Update:
    """The update, which also writes down the batches that it skips.

    After a call in which a step was skipped, and as long as there are fewer than `keep` of them,
    `directory` gets `step_<n>.npz`, the rollout as the update was given it, and `step_<n>.json`, a
    diagnosis: what was measured, which of the rollout's fields hold numbers that are not finite
    and in which rows, which parameters do (none, unless they did before), and the largest
    |log-ratio| of policy to behaviour where it is known. n is the state's step after the call. What
    was computed of the rollout inside the update, such as reference log-probs, is not part of it.

    In a job of several processes each writes the rows that its own devices hold, to
    `step_<n>.process_<i>.npz` and `.json`. Files are there completely or not at all.

    Args:
      update: from `make_update`; called with what the result is called with. The rollout must not
        be donated to it.
      directory: made with the first file.
      keep: largest number of batches in the directory, earlier sittings' included, so that a run
        that goes on skipping does not fill a disk.

    Returns:
      a function like `update`; it waits for the update to end.

    Raises:
      ValueError: a `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    directory = pathlib.Path(directory)

    def keeping(state: TrainState, rollout: Rollout, *rest: Any, **named: Any) -> Any:
        state, metrics = update(state, rollout, *rest, **named)
        if float(metrics["skipped_updates"]) > 0:
            suffix = f".process_{jax.process_index()}" if jax.process_count() > 1 else ""
            stored = len(list(directory.glob(f"step_*{suffix}.npz")))
            where = f"the batch is not kept: {directory} has {stored}"
            if stored < keep:
                path = directory / f"step_{int(state.step)}{suffix}.npz"
                _write(path, state, rollout, metrics)
                where = f"the batch is in {path}"
            seen = ", ".join(f"{n.replace('_', ' ')} {x}" for n, x in _measured(metrics).items())
            _log.warning("step %d skipped: %s; %s", int(state.step), seen, where)
        return state, metrics

    return keeping


def load_skipped(path: str | os.PathLike[str]) -> Rollout:
    """A rollout that `keep_skipped` wrote, of NumPy arrays, to the bit.

    Args:
      path: of the `.npz` file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that holds no rollout.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    dtypes = json.loads(str(arrays.pop(_DTYPES, "{}")))
    if missing := {"tokens", "mask", "rewards"} - arrays.keys():
        raise ValueError(
            f"{path}: expected a rollout, got one without {', '.join(sorted(missing))}"
        )
    arrays = {n: x.view(jnp.dtype(dtypes[n])) if n in dtypes else x for n, x in arrays.items()}
    fields: dict[str, Any] = {n: x for n, x in arrays.items() if "/" not in n}
    for name in ("extras", "memory"):
        if found := _below(arrays, name):
            fields[name] = found
    if old := _below(arrays, "old"):
        support = {n: old.pop(f"support/{n}", None) for n in TokenSupport._fields}
        if support["ids"] is not None:
            old["support"] = TokenSupport(**support)
        fields["old"] = PolicyOutputs(**old)
    return Rollout(**fields)


def describe_skipped(directory: str | os.PathLike[str]) -> str:
    """What the newest diagnosis in a directory of `keep_skipped` says, in a few lines.

    Args:
      directory: as given to `keep_skipped`; it need not exist.

    Returns:
      the lines, which name the directory and the file.
    """
    directory = pathlib.Path(directory)
    files = sorted(directory.glob("step_*.json"), key=lambda p: (_step_of(p), p.name))
    if not files:
        return f"no batch was kept in {directory}"
    found = json.loads(files[-1].read_text())
    lines = [f"batches that were skipped: {len(files)} in {directory}", f"newest: {files[-1]}"]
    measured = ("loss", "gradient_norm", "update_norm", "skipped_updates", "largest_log_ratio")
    lines += [f"  {n.replace('_', ' ')}: {found[n]}" for n in measured if found.get(n) is not None]
    bad = {n: f for n, f in found["fields"].items() if f["not_finite"]}
    for name, field in bad.items():
        more = ", ..." if field["num_rows"] > len(field["rows"]) else ""
        rows = ", ".join(map(str, field["rows"])) + more
        lines.append(f"  {name}: {field['not_finite']} not finite, in rows {rows}")
    if found["parameters_not_finite"]:
        lines.append(f"  parameters not finite: {', '.join(found['parameters_not_finite'])}")
    elif not bad:
        lines.append(
            "  all of the batch and of the parameters is finite: "
            "the model's outputs, the loss or the optimizer are not"
        )
    return "\n".join(lines)


def _measured(metrics: Metrics) -> dict[str, float]:
    names = ("loss", "gradient_norm", "update_norm")
    return {n: float(metrics[n]) for n in names if n in metrics}


def _write(path: pathlib.Path, state: TrainState, rollout: Rollout, metrics: Metrics) -> None:
    own = _own_rows(_paths.named_leaves(rollout))
    path.parent.mkdir(parents=True, exist_ok=True)
    foreign = {n: str(x.dtype) for n, x in own.items() if x.dtype.kind == "V"}
    plain = {n: x.view(f"u{x.itemsize}") if n in foreign else x for n, x in own.items()}
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **plain, **{_DTYPES: np.array(json.dumps(foreign))})
    partial.replace(path)
    diagnosis = {
        "step": int(state.step),
        "rollout": path.name,
        **{n: _number(x) for n, x in _measured(metrics).items()},
        "skipped_updates": float(metrics["skipped_updates"]),
        "largest_log_ratio": _largest_log_ratio(metrics),
        "fields": {n: f for n, x in own.items() if (f := _not_finite(x)) is not None},
        "parameters_not_finite": [
            name for name, x in _paths.named_leaves(state.params).items() if not _is_finite(x)
        ],
    }
    target = path.with_suffix(".json")
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(diagnosis, indent=2) + "\n")
    partial.replace(target)


def _own_rows(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The rows of every array that this process holds of `tokens`; no other process is asked."""

    def held(x: Any) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x), np.ones(np.shape(x)[:1], bool)
        array, rows = np.zeros(x.shape, x.dtype), np.zeros(x.shape[:1], bool)
        for shard in x.addressable_shards:
            array[shard.index] = np.asarray(shard.data)
            rows[shard.index[:1]] = True
        return array, rows

    _, rows = held(leaves["tokens"])
    arrays = {name: held(x)[0] for name, x in leaves.items()}
    return {n: x[rows] if x.shape[:1] == rows.shape else x for n, x in arrays.items()}


def _not_finite(array: np.ndarray) -> dict[str, Any] | None:
    """How many entries are not finite, and in which rows; None for what holds no real numbers."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return None
    bad = ~np.isfinite(array.astype(np.float32) if array.dtype.kind == "V" else array)
    rows = np.flatnonzero(bad.reshape(bad.shape[0], -1).any(1)) if bad.ndim else np.array([], int)
    return {
        "not_finite": int(bad.sum()),
        "num_rows": len(rows),
        "rows": rows[:_SHOWN_ROWS].tolist(),
    }


def _is_finite(x: Any) -> bool:
    """Whether all numbers of an array that are here are finite."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return True
    parts = [s.data for s in x.addressable_shards] if isinstance(x, jax.Array) else [x]
    return all(bool(jnp.all(jnp.isfinite(part))) for part in parts)


def _largest_log_ratio(metrics: Metrics) -> float | str | None:
    """From the extremes among the diagnostics, which hold log-ratios within ±20."""
    if not {"ratio_min", "ratio_max"} <= metrics.keys():
        return None
    with np.errstate(all="ignore"):
        ends = np.log([float(metrics["ratio_min"]), float(metrics["ratio_max"])])
    return _number(float(np.max(np.abs(ends))))


def _number(value: float) -> float | str:
    """As JSON has it: "nan", "inf" and "-inf" are strings there."""
    return value if math.isfinite(value) else str(value)


def _below(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    return {n.removeprefix(f"{name}/"): x for n, x in arrays.items() if n.startswith(f"{name}/")}


def _step_of(path: pathlib.Path) -> int:
    return int(path.name.removeprefix("step_").partition(".")[0])
