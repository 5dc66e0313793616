"""Programs in processes of their own, where JAX sees as many devices as a test asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def environment(devices: int) -> dict[str, str]:
    """This process's environment, with so many virtual CPU devices; programs find the tests.

    Several compute on one thread each and have threads to wait in: with fewer, all could wait for
    each other (`experiments.shared.runs.spare_threads`).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    threads = {}
    if devices > 1:
        flags += " --xla_cpu_multi_thread_eigen=false"
        threads["NPROC"] = str(8 * devices)
    return {
        **os.environ,
        **threads,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }


def run_each(code: str, *arguments: Any, processes: int, devices: int = 1) -> list[Any]:
    """What each process printed last, as JSON; the last of its arguments is its number."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments), str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(devices),
        )
        for process in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def run(code: str, *arguments: Any, devices: int = 8) -> Any:
    """What one process printed last, as JSON; `code` finds its arguments in `sys.argv`."""
    return run_each(code, *arguments, processes=1, devices=devices)[0]
