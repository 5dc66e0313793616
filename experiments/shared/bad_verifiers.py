"""A verifier that does what verifiers should not; loaded in worker processes, so light."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any


def verdict(completion: str, example: Mapping[str, Any]) -> float:
    """Does what the completion says, else says whether it is the answer."""
    if completion == "hang":
        time.sleep(1000)
    if completion == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM, signal.SIGINT})
        time.sleep(1000)
    if completion == "raise":
        raise KeyError("no such answer")
    if completion == "exit":
        os._exit(0)
    if completion == "leave":
        sys.exit(3)
    if completion == "flood":
        return float(len(bytearray(1 << 32)))
    if completion == "print":
        while True:
            print("x" * 1000)
    if completion == "crash":
        os.kill(os.getpid(), 11)
    if completion == "child":
        subprocess.Popen(["sleep", example["sleep"]], start_new_session=True)
        return 1.0
    if completion == "orphan":
        subprocess.Popen(["sleep", example["sleep"]], start_new_session=True)
        os._exit(0)
    return float(completion == example["answer"])
