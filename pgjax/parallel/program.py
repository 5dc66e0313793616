"""What a compiled program sends between devices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:body|condition|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction that devices take part in together.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute".
      times: how often it runs: the trip counts of the loops around it, multiplied.
      nbytes: of its result on one device.
      devices: in each group.
      in_loop: whether it is inside of one.
      exact: whether all those trip counts are known; one that is not counts as 1.
    """

    kind: str
    times: int
    nbytes: float
    devices: int
    in_loop: bool
    exact: bool

    @property
    def moved(self) -> float:
        """Bytes that a device sends all in all, by the algorithms that send least (rings).

        Of a group of n, with a result of b bytes: all-gather and all-to-all `b (n-1)/n`,
        reduce-scatter `b (n-1)`, all-reduce `2 b (n-1)/n`, collective-permute b.
        """
        n = self.devices
        share = {
            "all-gather": (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1.0,
        }[self.kind]
        return self.times * self.nbytes * share


def collectives(text: str, num_devices: int) -> list[Collective]:
    """All collectives of an optimised program.

    Branches of a conditional are counted as if every one ran.

    Args:
      text: `compiled.as_text()`.
      num_devices: that it was compiled for; a group without a list is all of them.

    Raises:
      ValueError: text that is no program.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = None if line[:1].isspace() else _COMPUTATION.match(line)
        if header:
            current = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None:
            current.append(line)
    if entry is None:
        raise ValueError("text: expected an optimised program, got one without an entry")
    return list(_of(entry, bodies, num_devices, times=1, in_loop=False, exact=True))


def _of(
    name: str,
    bodies: dict[str, list[str]],
    num_devices: int,
    *,
    times: int,
    in_loop: bool,
    exact: bool,
) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        result, opcode = instruction[1], instruction[2]
        kind = opcode.removesuffix("-start")
        if kind in _KINDS:
            shapes = _sizes(result)
            # What starts an asynchronous one also returns what it was given.
            nbytes = max(shapes) if opcode != kind else sum(shapes)
            devices = _group_size(line, num_devices)
            yield Collective(kind, times, nbytes, devices, in_loop, exact)
        inner = _CALLED.findall(line)
        branches = _BRANCHES.search(line)
        if branches:
            inner += [part.strip().lstrip("%") for part in branches[1].split(",")]
        loop = opcode == "while"
        trips = _TRIPS.search(line) if loop else None
        for called in inner:
            yield from _of(
                called,
                bodies,
                num_devices,
                times=times * (int(trips[1]) if trips else 1),
                in_loop=in_loop or loop,
                exact=exact and (trips is not None or not loop),
            )


def _sizes(result: str) -> list[float]:
    """Bytes of every array in a result's type."""
    return [
        _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _SHAPE.findall(result)
        if dtype in _BYTES
    ]


def _group_size(line: str, num_devices: int) -> int:
    start = line.find("replica_groups=")
    if start < 0:
        return num_devices if "source_target_pairs" not in line else 2
    groups = line[start + len("replica_groups=") :]
    iota = re.match(r"\[(\d+),(\d+)\]<=", groups)
    if iota:
        return int(iota[2])
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}", groups)
    if mesh:
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    listed = re.match(r"\{\{([\d,]+)\}", groups)
    return len(listed[1].split(",")) if listed else num_devices
