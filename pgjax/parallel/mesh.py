"""The device mesh: five named axes, of size 1 where unused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

AXES = ("data", "fsdp", "tensor", "expert", "sequence")
"""`data` splits the batch; `fsdp` splits batch and parameters; `tensor` splits the inside of each
layer; `expert` splits batch and experts; `sequence` splits the tokens of each row."""

REST = -1


def _checked(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes as a plain dict, or ValueError for an unknown axis, a bad size or two rests."""
    for name, size in sizes.items():
        if name not in AXES:
            raise ValueError(f"mesh: unknown axis {name!r}, expected one of {', '.join(AXES)}")
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"mesh: axis {name} has size {size!r}, expected an integer")
        if size < 1 and size != REST:
            raise ValueError(
                f"mesh: axis {name} has size {size}, expected at least 1, or {REST} for the rest"
            )
    rests = [name for name, size in sizes.items() if size == REST]
    if len(rests) > 1:
        raise ValueError(f"mesh: only one axis may be {REST}, got {' and '.join(rests)}")
    return dict(sizes)


def parse_mesh(spec: str) -> dict[str, int]:
    """Axis sizes from text such as `"data=2,fsdp=4"`.

    Args:
      spec: comma-separated `axis=size`; axes from `AXES`; sizes at least 1, and one of them may be
        -1: whatever number of devices the others leave. Spaces are ignored; "" names no axis.

    Returns:
      sizes by axis in the order given; axes not named are absent.

    Raises:
      ValueError: text of another form, an unknown or repeated axis, a size of 0 or below (other
        than one -1).
    """
    sizes: dict[str, int] = {}
    for part in spec.split(",") if spec.strip() else []:
        name, equals, size = (text.strip() for text in part.partition("="))
        if not equals:
            raise ValueError(f"mesh: expected axis=size,axis=size,..., got {part!r} in {spec!r}")
        if name in sizes:
            raise ValueError(f"mesh: axis {name} appears twice in {spec!r}")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ValueError(
                f"mesh: axis {name} has size {size!r} in {spec!r}, expected an integer"
            ) from None
    return _checked(sizes)


def _resolved(sizes: dict[str, int], num_devices: int) -> tuple[int, ...]:
    """Sizes of all axes in order, with the rest filled in; their product is `num_devices`."""
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    named = math.prod(size for size in sizes.values() if size != REST)
    if REST in sizes.values():
        if num_devices % named:
            raise ValueError(
                f"mesh: {text} needs a multiple of {named} devices, but there are {num_devices}"
            )
    elif named != num_devices:
        hint = (
            "; give one axis -1 to use the rest, or pass the devices to use"
            if named < num_devices
            else ""
        )
        raise ValueError(f"mesh: {text} needs {named} devices, but there are {num_devices}{hint}")
    rest = num_devices // named
    return tuple(rest if sizes.get(axis) == REST else sizes.get(axis, 1) for axis in AXES)


def make_mesh(
    spec: str | Mapping[str, int] | None = None, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all of `AXES`, laid out for fast links where the platform's topology is known.

    Args:
      spec: text for `parse_mesh`, sizes by axis, or None; where no axis is named, `data=-1`: every
        device along `data`. Other axes not named have size 1, so that any rules fit any mesh.
      devices: default: all devices of all processes.

    Returns:
      a mesh of Auto axes: the compiler propagates shardings from those of the arguments. JAX makes
      Explicit axes by default in its newer versions, so the choice is made here, once.

    Raises:
      ValueError: as `parse_mesh`, and where the product of the sizes is not the device count.
    """
    sizes = parse_mesh(spec) if isinstance(spec, str) else _checked(spec or {})
    sizes = sizes or {"data": REST}
    devices = jax.devices() if devices is None else list(devices)
    options: dict[str, Any] = {"devices": devices}
    axis_type = getattr(jax.sharding, "AxisType", None)
    if axis_type is not None and "axis_types" in inspect.signature(jax.make_mesh).parameters:
        options["axis_types"] = (axis_type.Auto,) * len(AXES)
    return jax.make_mesh(_resolved(sizes, len(devices)), AXES, **options)
