"""Running a program that nobody has read."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pgjax.rewards.isolated import sandbox
from pgjax.rewards.isolated.sandbox import Limits


class ProgramResult(NamedTuple):
    """What became of a program.

    Attributes:
      returncode: its exit status, 128 + n for signal n; None where it was ended by a limit.
      stdout, stderr: what it printed, up to the limit.
      seconds: that it took, start of the interpreter included.
      ended_by: "time" or "output" where that limit ended it; "" otherwise.
    """

    returncode: int | None
    stdout: str
    stderr: str
    seconds: float
    ended_by: str


def run_program(
    source: str,
    stdin: str = "",
    *,
    limits: Limits = Limits(),  # noqa: B008, frozen
) -> ProgramResult:
    """Runs Python source in a process, a directory and an environment of its own.

    The directory is empty but for the program and is removed afterwards; processes that it leaves
    are killed. The interpreter is this one, isolated (`-I`), with its installed packages.

    Args:
      source: the program's text.
      stdin: what it can read.
      limits: for all of it together.

    Returns:
      what became of it; only a system that cannot start processes raises.
    """
    with tempfile.TemporaryDirectory(prefix="pgjax_program_") as directory:
        path = Path(directory) / "program.py"
        path.write_text(source)
        given = Path(directory) / "stdin"
        given.write_text(stdin)
        started = time.monotonic()
        with given.open("rb") as file:
            given.unlink()
            process = sandbox.spawn(
                [sys.executable, "-I", "-B", str(path)],
                limits,
                memory_bytes=limits.memory_bytes or 0,
                cpu_seconds=int(limits.seconds) + 1,
                env=sandbox.environment(HOME=directory, TMPDIR=directory),
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=directory,
            )
        try:
            texts, ended_by = _read(process, started + limits.seconds, limits.output_bytes)
            code = None if ended_by else process.wait()
        finally:
            sandbox.destroy(process)
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()
    out, err = (text.decode(errors="replace") for text in texts)
    return ProgramResult(code, out, err, time.monotonic() - started, ended_by)


def _read(
    process: subprocess.Popen[bytes], deadline: float, most: int
) -> tuple[tuple[bytes, bytes], str]:
    """Both streams until the process ends or one is too long, and which limit was met."""
    assert process.stdout is not None and process.stderr is not None
    texts = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}

    def so_far() -> tuple[bytes, bytes]:
        out, err = (bytes(text[:most]) for text in texts.values())
        return out, err

    with selectors.DefaultSelector() as selector:
        for stream in texts:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(max(left, 0.0))
            if not ready and left <= 0:
                return so_far(), "time"
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                texts[key.fd] += data
                if len(texts[key.fd]) > most:
                    return so_far(), "output"
    # Closed streams are not an end yet.
    try:
        process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return so_far(), "time"
    return so_far(), ""
