"""Several processes as one program: joining them, and what they have to agree on."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from pgjax.parallel.sharding import batch_sharding, row_ways

_Value = TypeVar("_Value")
_MISSING = "<missing>"


def connect(coordinator: str | None, *, count: int | None = None, index: int | None = None) -> None:
    """Joins this process to the others of its job; call it before anything touches a device.

    Args:
      coordinator: `host:port` that process 0 listens on; "auto" where Slurm, Open MPI, Kubernetes
        or a TPU's metadata say all of it; None: this process is alone, nothing is done.
      count: number of processes.
      index: of this one, from 0.

    Raises:
      ValueError: count or index without a coordinator, out of range, or missing beside an address.
      RuntimeError: the others do not come, or devices have been used already.
    """
    if coordinator is None:
        if count is not None or index is not None:
            raise ValueError("processes: count and index need a coordinator, such as host:port")
        return
    if coordinator == "auto":
        jax.distributed.initialize(num_processes=count, process_id=index)
        return
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ValueError(
            f"processes: expected a coordinator host:port or auto, got {coordinator!r}"
        )
    if count is None or index is None:
        raise ValueError("processes: a coordinator's address needs count and index beside it")
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"processes: expected an index from 0 to count - 1, got index {index} of {count}"
        )
    jax.distributed.initialize(coordinator, count, index)


def is_first() -> bool:
    """Whether this process is the one that writes logs and files."""
    return jax.process_index() == 0


def gather_json(value: Any) -> list[Any]:
    """The JSON data of every process, in order; every process calls it."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value, default=str))]
    text = np.frombuffer(json.dumps(value, default=str).encode(), np.uint8)
    sizes = np.reshape(multihost_utils.process_allgather(np.int32(text.size)), -1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(row[:size].tobytes())
        for row, size in zip(rows.reshape(len(sizes), -1), sizes, strict=True)
    ]


def on_first(function: Callable[[], _Value]) -> _Value:
    """What `function`, called in process 0 only, returns (JSON data) or raises, in all of them.

    An error of a built-in class is of that class everywhere; others are RuntimeErrors elsewhere.
    """
    if jax.process_count() == 1:
        return function()
    mine: dict[str, Any] = {}
    error = None
    if is_first():
        try:
            mine = {"value": function()}
        except Exception as raised:
            error = raised
            mine = {"error": type(raised).__name__, "message": str(raised)}
    found = gather_json(mine)[0]
    if error is not None:
        raise error
    if "error" in found:
        kind = getattr(builtins, found["error"], RuntimeError)
        raise kind(found["message"])
    return found["value"]


def first_then_others(function: Callable[[], _Value]) -> _Value:
    """`function` in process 0 and then in the others, who find what it left on a shared disk.

    What it raises in process 0 is raised in all, as by `on_first`.
    """
    results: list[_Value] = []
    on_first(lambda: results.append(function()))
    return results[0] if is_first() else function()


def largest_of(number: int) -> int:
    """The largest of the processes' numbers; every process calls it."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises ValueError, in every process, where they do not all have the same facts.

    Args:
      facts: JSON data by name, nested mappings included: configuration, versions, devices.

    Raises:
      ValueError: naming what differs, with each process's value.
    """
    every = [_flat(found) for found in gather_json(facts)]
    names = list(dict.fromkeys(name for found in every for name in found))
    differing = [n for n in names if len({repr(f.get(n, _MISSING)) for f in every}) > 1]
    if differing:
        shown = "; ".join(
            f"{name}: "
            + ", ".join(f"{found.get(name, _MISSING)!r} in {i}" for i, found in enumerate(every))
            for name in differing
        )
        raise ValueError(f"processes: expected the same in all {len(every)}, but {shown}")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    result: dict[str, Any] = {}
    for name, item in value.items():
        result |= _flat(item, f"{prefix}.{name}" if prefix else name)
    return result


def process_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process's devices hold, and of how many: index and count.

    It is what Grain's loaders take as `shard_index` and `shard_count`. Processes whose devices
    hold the same rows, along `tensor`, have the same part.

    Raises:
      ValueError: devices of one process hold rows that do not lie together, or parts differ in
        size: an unusual order of the mesh's devices.
    """
    ways = row_ways(mesh)
    places = batch_sharding(mesh).addressable_devices_indices_map((ways,))
    rows = sorted({(0 if i[0].start is None else i[0].start) for i in places.values() if i})
    if rows != list(range(rows[0], rows[0] + len(rows))) or ways % len(rows) or rows[0] % len(rows):
        raise ValueError(
            f"mesh: this process has parts {rows} of the {ways} that a batch is cut into, "
            "expected some that lie together, as many in every process"
        )
    return rows[0] // len(rows), ways // len(rows)


def place_rows(batch: Any, mesh: Mesh) -> Any:
    """A batch on the mesh from each process's own rows (`process_shard`), which lie together.

    Args:
      batch: arrays `[B / count, ...]`.
      mesh: from `make_mesh`.

    Returns:
      global arrays `[B, ...]`, rows split as `batch_sharding` says.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: jax.device_put(x, sharding), batch)
    index, count = process_shard(mesh)

    def place(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        first = index * rows.shape[0]

        def part(where: Any) -> np.ndarray:
            start, stop, _ = where[0].indices(rows.shape[0] * count)
            return rows[(slice(start - first, stop - first), *where[1:])]

        shape = (rows.shape[0] * count, *rows.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


def fetch(tree: Any) -> Any:
    """Every array whole, as NumPy, in every process; all of them call it."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def own_rows(tree: Any) -> tuple[Any, int]:
    """The rows that this process's devices hold, as NumPy, and the index of the first of them.

    Where one process has all devices, those are all rows, from 0.

    Args:
      tree: arrays `[B, ...]` on one mesh, or NumPy arrays of which every process has the whole;
        rows that a program left elsewhere are split as `batch_sharding` says first, so every
        process calls it.

    Returns:
      arrays `[B / count, ...]` (see `process_shard`), and `index * B / count`.
    """
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree), 0
    leaves = jax.tree.leaves(tree)
    placed = next(x.sharding for x in leaves if isinstance(x, jax.Array))
    assert isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh)
    mesh = placed.mesh
    index, count = process_shard(mesh)
    sharding = batch_sharding(mesh)
    size = np.shape(leaves[0])[0] // count

    def own(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array):
            return np.asarray(x)[index * size : (index + 1) * size]
        x = jax.device_put(x, sharding)
        parts = {s.index[0].start or 0: s for s in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])

    return jax.tree.map(own, tree), index * size


def rows_of_all(rows: np.ndarray, like: Any) -> jax.Array:
    """What each process found for its own rows, as one array on the mesh.

    Of processes that hold the same rows the first decides, so that copies are the same.

    Args:
      rows: `[B / count, ...]`, for the rows that `own_rows` gave.
      like: an array on the mesh.
    """
    if jax.process_count() == 1:
        return jnp.asarray(rows)
    mesh = like.sharding.mesh
    index, count = process_shard(mesh)
    found = np.asarray(multihost_utils.process_allgather(rows))
    indices = [int(i) for i in gather_json(index)]
    whole = np.concatenate([found[indices.index(i)] for i in range(count)])
    sharding = batch_sharding(mesh)
    return jax.make_array_from_callback(whole.shape, sharding, lambda where: whole[where])
