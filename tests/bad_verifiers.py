"""Verifiers that do what verifiers should not; loaded in worker processes."""

import os
import subprocess
import sys
import time


def verdict(completion, example):
    """Does what the completion says, else says whether it is the answer."""
    if completion == "hang":
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
    if completion == "text":
        return "yes"
    if completion == "nan":
        return float("nan")
    if completion == "secrets":
        return float("SECRET_TOKEN" in os.environ)
    if completion == "network":
        import socket

        with socket.socket() as one:
            one.settimeout(2)
            one.connect(("127.0.0.1", example["port"]))
        return 1.0
    if completion == "accelerator":
        return float(os.environ.get("JAX_PLATFORMS") == "cpu")
    return float(completion == example["answer"])
