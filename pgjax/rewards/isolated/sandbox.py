"""Processes of their own: limited, without secrets or network, and gone with all they started."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pgjax import _checks

_LAUNCHER = pathlib.Path(__file__).with_name("launcher.py")
# What a program may know of where it runs: nothing that names a user, a key or a service.
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "SYSTEMROOT")
_NAMESPACES = ("unshare", "--user", "--net", "--pid", "--fork", "--kill-child=SIGKILL")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one verdict, or one program, may use.

    Attributes:
      seconds: of wall time; above 0.
      memory_bytes: of address space, for a verifier beyond what its imports took; None: no limit.
        Enforced by Linux.
      file_bytes: the largest file that may be written.
      output_bytes: of what a program prints, on each of its two streams; more ends it.
      network: whether there is one. Without, processes get namespaces of their own where the
        system allows that; `isolates` says whether it does.
    """

    seconds: float = 10.0
    memory_bytes: int | None = 1 << 30
    file_bytes: int = 1 << 24
    output_bytes: int = 1 << 20
    network: bool = False

    def __post_init__(self) -> None:
        _checks.in_range("seconds", self.seconds, 0, low_open=True)
        if self.memory_bytes is not None:
            _checks.in_range("memory_bytes", self.memory_bytes, 1)
        _checks.in_range("file_bytes", self.file_bytes, 1)
        _checks.in_range("output_bytes", self.output_bytes, 1)


@functools.cache
def isolates() -> bool:
    """Whether processes can have namespaces of their own, of processes and network, here."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    try:
        done = subprocess.run([*_NAMESPACES, "true"], capture_output=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def environment(**more: str) -> dict[str, str]:
    """The variables a process is given; accelerators are not for it."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    return {**kept, **threads, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", **more}


def spawn(
    program: Sequence[str],
    limits: Limits,
    *,
    memory_bytes: int = 0,
    cpu_seconds: int = 0,
    env: Mapping[str, str],
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own; it is killed when this process ends.

    On Linux it is also killed when the thread that calls this ends.

    Args:
      memory_bytes, cpu_seconds: 0: no limit.
      options: of `subprocess.Popen`.
    """
    python = [sys.executable, "-I", str(_LAUNCHER)]
    numbers = [str(n) for n in (memory_bytes, cpu_seconds, limits.file_bytes)]
    own = str(os.getpid())
    if limits.network or not isolates():
        command = [*python, "supervise", own, *numbers, "--", *program]
    else:
        inside = [*python, "supervise", "0", *numbers, "--", *program]
        command = [*python, "become", own, "--", *_NAMESPACES, *inside]
    return subprocess.Popen(command, env=dict(env), start_new_session=True, **options)


def destroy(process: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """Kills a process and all that descend from it; returns when they are gone."""
    if process.poll() is not None:  # its number may be another's by now
        return
    deadline = time.monotonic() + patience
    while True:
        # Descendants first: those of a dead process belong to another.
        left = descendants(process.pid)
        for pid in left:
            _kill(pid)
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _kill(process.pid)
    process.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Living ones, by Linux's own lists; elsewhere none are known."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for path in pathlib.Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                children = [int(word) for word in path.read_text().split()]
            except (OSError, ValueError):
                continue
            found += [child for child in children if alive(child)]
            waiting += children
    return found


def alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")
