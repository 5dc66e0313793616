"""Verifiers that do what verifiers should not; loaded in worker processes."""

import os

from experiments.shared import bad_verifiers


def verdict(completion, example):
    """What the completion says: strange results, what is seen of the machine, or worse."""
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
    return bad_verifiers.verdict(completion, example)
