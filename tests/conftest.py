"""Hundreds of small programs are compiled here: compiling has to be fast, running need not be."""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:
    flags += " --xla_backend_optimization_level=0"
# The older of two code generators compiles twice as fast; other releases may not have the choice,
# and XLA ends the process over a flag that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = flags.strip()


def pytest_collection_modifyitems(items):
    """The one test of minutes comes first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: "killed_ten_times" not in item.nodeid)
